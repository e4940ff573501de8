#!/usr/bin/env bash
# What a Google Cloud project needs once for cluster/gcp.yaml: a private network, two accounts, a bucket, a registry.
# A project of its own is best: Google checks some rights of the head, such as listing instances, on the whole project.
set -euo pipefail
if [ $# -ne 3 ]; then
    echo "usage: $0 PROJECT REGION BUCKET" >&2
    exit 2
fi
project=$1 region=$2 bucket=$3
export CLOUDSDK_CORE_PROJECT=$project

gcloud services enable compute.googleapis.com iam.googleapis.com iap.googleapis.com \
    cloudresourcemanager.googleapis.com artifactregistry.googleapis.com

# Network: no public addresses; Google's own services are reached privately, SSH comes from the Identity-Aware Proxy.
gcloud compute networks create raybert --subnet-mode=custom
gcloud compute networks subnets create raybert --network=raybert --region="$region" --range=10.20.0.0/16 \
    --enable-private-ip-google-access
gcloud compute firewall-rules create raybert-inside --network=raybert --direction=INGRESS --action=ALLOW \
    --rules=all --source-ranges=10.20.0.0/16
gcloud compute firewall-rules create raybert-ssh --network=raybert --direction=INGRESS --action=ALLOW \
    --rules=tcp:22 --source-ranges=35.235.240.0/20

# Data and images.
gcloud storage buckets create "gs://$bucket" --location="$region" --uniform-bucket-level-access \
    --public-access-prevention
gcloud artifacts repositories create raybert --repository-format=docker --location="$region"

# Accounts: both read and write the bucket and pull images.
domain=$project.iam.gserviceaccount.com
for name in raybert-head raybert-worker; do
    gcloud iam service-accounts create "$name"
    gcloud storage buckets add-iam-policy-binding "gs://$bucket" \
        --member="serviceAccount:$name@$domain" --role=roles/storage.objectUser
    gcloud storage buckets add-iam-policy-binding "gs://$bucket" \
        --member="serviceAccount:$name@$domain" --role=roles/storage.legacyBucketReader
    gcloud artifacts repositories add-iam-policy-binding raybert --location="$region" \
        --member="serviceAccount:$name@$domain" --role=roles/artifactregistry.reader
done

# The head makes instances, with the workers' account only, and changes and ends those whose name is the cluster's.
head=serviceAccount:raybert-head@$domain
gcloud iam service-accounts add-iam-policy-binding "raybert-worker@$domain" \
    --member="$head" --role=roles/iam.serviceAccountUser
gcloud iam roles create raybertCreate --project="$project" --title="raybert: create instances" --permissions=\
compute.instances.create,compute.instances.get,compute.instances.list,compute.disks.create,\
compute.images.useReadOnly,compute.subnetworks.use,compute.zoneOperations.get
gcloud iam roles create raybertChange --project="$project" --title="raybert: change and end instances" --permissions=\
compute.instances.delete,compute.instances.setLabels,compute.instances.setMetadata,\
compute.instances.setServiceAccount
gcloud projects add-iam-policy-binding "$project" --member="$head" --condition=None \
    --role="projects/$project/roles/raybertCreate"
gcloud projects add-iam-policy-binding "$project" --member="$head" \
    --role="projects/$project/roles/raybertChange" --condition="title=cluster,expression=\
resource.name.extract('/instances/{name}').startsWith('ray-raybert-')"

# `ray up` always makes this account and makes it an administrator of the project; disabled, it can do nothing.
gcloud iam service-accounts create ray-autoscaler-sa-v1
gcloud iam service-accounts disable "ray-autoscaler-sa-v1@$domain"
