"""What a run is: frozen dataclasses by section, each default written once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Which samples are trained on, and in which order."""

    input_files: str = ""
    """TFRecord files: comma-separated paths or globs; local, s3:// or gs://."""
    vocab_file: str | None = None
    """WordPiece vocabulary, one token a line; it goes into every checkpoint so that transformers can tokenise."""
    max_seq_length: int = 128
    """Tokens in each sample; must equal the files'."""
    max_predictions_per_seq: int = 20
    """Masked positions in each sample; must equal the files'."""
    masking: Literal["static", "dynamic"] = "static"
    """static: the tokens that the files mask. dynamic: each epoch masks others, of which data.vocab_file knows."""
    masked_lm_prob: float = 0.15
    """Dynamic masking: share of a sample's tokens that is to be predicted."""
    do_whole_word_mask: bool = False
    """Dynamic masking: mask whole words."""
    max_ngram_size: int = 1
    """Dynamic masking: mask runs of up to so many whole words."""
    on_bad_record: Literal["error", "skip"] = "error"
    """What to do with damaged records: refuse to train, or leave them out, counted and listed in the run directory."""
    window_size: int = 32768
    """Samples shuffled among each other; pages of 256 neighbouring records are shuffled over the whole epoch."""


@dataclass(frozen=True)
class ModelConfig:
    """The encoder, by the names of Google's bert_config.json."""

    vocab_size: int = 30522
    """Entries of the vocabulary."""
    hidden_size: int = 768
    """Width D of the encoder."""
    num_hidden_layers: int = 12
    """Transformer layers."""
    num_attention_heads: int = 12
    """Attention heads H; must divide hidden_size."""
    intermediate_size: int = 3072
    """Width F of the feed-forward layer."""
    hidden_act: str = "gelu"
    """Activation, by transformers' names: gelu (erf), gelu_new (tanh form, Model Garden's), relu, silu, ..."""
    hidden_dropout_prob: float = 0.1
    """Dropout after embeddings and sub-layers."""
    attention_probs_dropout_prob: float = 0.1
    """Dropout on attention probabilities."""
    max_position_embeddings: int = 512
    """Longest sequence the position table covers."""
    type_vocab_size: int = 2
    """Kinds of segment ids."""
    initializer_range: float = 0.02
    """Standard deviation parameter of the truncated normal initialiser (cut at two)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or LAMB, and the learning rate over the steps."""

    type: Literal["adamw", "lamb"] = "adamw"
    """Optimizer; neither decays a bias or a LayerNorm."""
    learning_rate: float = 1e-4
    """Peak learning rate, reached at the end of the warm-up."""
    end_lr: float = 0.0
    """Learning rate after the last step, approached linearly."""
    warmup_steps: int = 0
    """Steps of linear warm-up; below num_steps."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    beta_1: float = 0.9
    """Decay of the first moment."""
    beta_2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-6
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """The gradient of the global batch is clipped to this norm; 0 does not clip."""


@dataclass(frozen=True)
class TrainingConfig:
    """How many steps, of what."""

    num_steps: int = 1000
    """Global batches to train on."""
    global_batch_size: int = 256
    """Samples per step over all workers; constant for a run, whatever the number of workers."""
    micro_batch_size: int = 32
    """Samples per forward and backward on one worker at most; bounds memory only."""
    micro_batch_tokens: int | Literal["auto"] = 0
    """Real tokens per forward and backward at most; 0: any. auto: what fits a GPU, however many samples; on CPUs 0."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward; weights stay fp32."""
    compile: bool = False
    """Compile the encoder's layers (torch.compile), which takes a minute or so when workers start; for GPUs."""
    float8: bool = False
    """Matrix products of the layers in fp8, by torchao, where precision is bf16; for Ada, Hopper and later GPUs."""
    activation_checkpointing: bool = False
    """Compute each layer again in backward instead of keeping what is inside of it: less memory, a third more work."""
    use_next_sentence_label: bool = True
    """Train next sentence prediction too; false is masked LM only."""
    init_checkpoint: str | None = None
    """Initial weights: a transformers directory, a raybert checkpoint or run. A run found in run_dir wins over it."""
    init_optimizer: bool = False
    """Take the optimizer's moments of init_checkpoint too, as `convert` brings them from TensorFlow."""
    seed: int = 12345
    """Seed of initial weights, sample order and dropout."""
    log_every_steps: int = 10
    """Steps between two progress lines."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every_steps: int | Literal["auto"] = 1000
    """Steps between two checkpoints; one more is saved at the end. auto: what wastes least by measurement."""
    snapshot_every_steps: int = 0
    """Steps between two snapshots in the memory of two nodes, which a run goes on from after a loss; 0: none."""
    keep: int = 3
    """Newest checkpoints that are kept; 0 keeps all."""
    outage_limit_s: float = 1800.0
    """Seconds without a commit, while storage fails, after which a warning says so; the end of a run waits as long."""


@dataclass(frozen=True)
class GuardConfig:
    """When training goes back to the newest checkpoint by itself, to leave out the steps that spoilt it."""

    max_non_finite: int = 3
    """So many gradients in a row that are not finite roll the run back; each alone makes no update."""
    spike_sigma: float = 0.0
    """A loss so many standard deviations above the mean rolls the run back; 6 is OLMo's, 0: none does."""
    spike_window: int = 128
    """Steps that mean and deviation are taken over; an attempt knows no spike before it has made so many."""
    max_rollbacks: int = 3
    """Rollbacks of a run; where one more would be needed, it ends with an error."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out masked LM and next sentence prediction."""

    input_files: str = ""
    """Held-out TFRecord files, as data.input_files; empty: no evaluation."""
    every_steps: int = 0
    """Steps between two evaluations; 0: only at the end."""
    num_steps: int | None = None
    """At most so many global batches; default: the whole set."""


@dataclass(frozen=True)
class ClusterConfig:
    """What the run asks of the Ray cluster."""

    num_workers: int | str = 1
    """Workers: a number, or 'min,max' for an elastic run. 0 trains in this process, without Ray actors."""
    use_gpu: bool = False
    """Give each worker one GPU."""
    cpus_per_worker: int = 1
    """CPUs of each worker, also its torch threads; the feed needs at least one CPU beyond the workers'."""
    resize_check_s: float = 60.0
    """Seconds between two looks at whether the cluster allows another number of workers."""
    start_timeout_s: float = 20.0
    """Seconds that starting a worker group may take before a smaller one is tried."""
    collective_timeout_s: float = 180.0
    """Seconds after which a hanging collective is an error."""
    hang_timeout_s: float = 120.0
    """Seconds after which a worker that does not answer is killed and replaced; after half of them it is named."""
    keep_spares: bool = True
    """On a cluster, keep a process ready beside each worker, so that another attempt starts in seconds; 0.5 GB each."""
    price_per_worker_hour: float | None = None
    """What a worker costs an hour, in any currency; the summary of a run then says what the run has cost."""

    def worker_range(self) -> tuple[int, int]:
        """Smallest and largest number of workers."""
        low, _, high = str(self.num_workers).partition(",")
        return int(low), int(high or low)


@dataclass(frozen=True)
class LoggingConfig:
    """Where metrics go beside the run directory; keys and passwords only by the libraries' own variables."""

    wandb_project: str | None = None
    """Log to this project of Weights & Biases (pip install 'raybert[wandb]'); WANDB_MODE=offline logs to files."""
    mlflow_experiment: str | None = None
    """Log to this experiment of MLflow (pip install 'raybert[mlflow]')."""
    mlflow_tracking_uri: str | None = None
    """MLflow's server or database, such as http://host:5000 or sqlite:///mlflow.db; default: MLFLOW_TRACKING_URI."""
    run_name: str | None = None
    """The run's name there; default: the last part of run_dir."""


@dataclass(frozen=True)
class Config:
    """A pretraining run."""

    run_dir: str = "runs/raybert"
    """Where everything of the run is kept: a local directory, s3:// or gs://. A run found there is continued."""
    bert_config_file: str | None = None
    """A bert_config.json of Google's or a transformers config.json; replaces the model section."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
