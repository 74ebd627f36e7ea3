"""How long a person waits: `minimind --help`, a command's help, and the first token of `minimind chat RUN`.

    python benchmarks/startup.py [--run runs/demo/sft] [--repeat 7]

Medians of whole processes, from start to the output named; written to `benchmarks/results/startup.json`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "startup.json"
MINIMIND = str(Path(sys.executable).with_name("minimind"))


def until_end(*words: str) -> float:
    """Return the seconds that a command takes."""
    start = time.perf_counter()
    subprocess.run([*words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return time.perf_counter() - start


def until_first_byte(*words: str) -> float:
    """Return the seconds until a command writes to stdout."""
    start = time.perf_counter()
    with subprocess.Popen(
        [*words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    ) as child:
        assert child.stdout
        if not child.stdout.read(1):
            sys.exit(f"{' '.join(words)} wrote nothing")
        seconds = time.perf_counter() - start
        child.stdout.read()
    return seconds


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", default="runs/demo/sft")
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    measures = {
        "minimind --help": lambda: until_end(MINIMIND, "--help"),
        "minimind pretrain --help": lambda: until_end(MINIMIND, "pretrain", "--help"),
        "python -c 'import torch'": lambda: until_end(sys.executable, "-c", "import torch"),
        "minimind chat RUN --prompt Hello, first token": lambda: until_first_byte(
            MINIMIND, "chat", options.run, "--prompt", "Hello!"
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(options.repeat):  # interleaved, so that a busy moment hits all alike
        for name, measure in measures.items():
            seconds[name].append(measure())
    medians = {name: round(statistics.median(found), 3) for name, found in seconds.items()}
    for name, median in medians.items():
        print(f"{median:8.3f} s  {name}")
    RESULTS.write_text(json.dumps({"unit": "seconds, median", "repeat": options.repeat, **medians}, indent=1) + "\n")


if __name__ == "__main__":
    main()
