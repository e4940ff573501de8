"""A page in headless Chromium, over its DevTools protocol: what it shows, says and asks for."""

import asyncio
import itertools
import json
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import aiohttp

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
]
START_S = 60.0


@contextmanager
def chromium():
    """The port of a browser with an empty profile."""
    with tempfile.TemporaryDirectory(prefix="rb", ignore_cleanup_errors=True) as profile:
        command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            place, deadline_s = Path(profile) / "DevToolsActivePort", time.monotonic() + START_S
            while not place.exists() or "\n" not in place.read_text():
                assert process.poll() is None and time.monotonic() < deadline_s, "Chromium does not start"
                time.sleep(0.05)
            yield int(place.read_text().split()[0])
        finally:
            process.terminate()
            process.wait(20)


def load(port, path, width, scheme, *expressions):
    """Values of expressions on a file's page at a width and in a colour scheme; and every event of the browser's."""
    return asyncio.run(_load(port, path, width, scheme, expressions))


async def _load(port, path, width, scheme, expressions):
    async with aiohttp.ClientSession() as session:
        async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
            target = await answer.json(content_type=None)
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            events, numbers = [], itertools.count(1)

            async def received():
                message = json.loads((await asyncio.wait_for(socket.receive(), START_S)).data)
                events.append(message)
                return message

            async def call(method, **params):
                number = next(numbers)
                await socket.send_json({"id": number, "method": method, "params": params})
                while (message := await received()).get("id") != number:
                    pass
                assert "error" not in message, message
                return message["result"]

            for domain in ("Page", "Runtime", "Log", "Network"):
                await call(f"{domain}.enable")
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            await call("Emulation.setDeviceMetricsOverride", **size)
            media = [{"name": "prefers-color-scheme", "value": scheme}]
            await call("Emulation.setEmulatedMedia", features=media)
            await call("Page.navigate", url=path.as_uri())
            while not any(event.get("method") == "Page.loadEventFired" for event in events):
                await received()
            found = [await call("Runtime.evaluate", expression=each, returnByValue=True) for each in expressions]
            await call("Page.close")
            return [each["result"].get("value") for each in found], events
