"""What this machine can do at most: matrix products, reading memory, matrix times vector, at a number of threads.

    python benchmarks/limits.py [--threads 2] [--rounds 5]

Other benchmarks let it play between their contenders, so that "share of the limit" is of the same minutes. A round is
the best of a few tries; the figures are medians of rounds:

- gemm_*: GFLOP/s of a 2048 x 2048 x 2048 product
- read_*_gb_per_s: reading 26, 52 or 104 MB again and again (int8, bf16 and fp32 weights of the small preset)
- matvec_*_gb_per_s: weights read by torch's product of a matrix (6656 x 2048) with a vector
"""

import json

import contest

MEGABYTES = (26, 52, 104)


def measure(_task: contest.Task) -> contest.Round:
    """Return a round that measures the machine."""
    import torch

    squares = {"fp32": torch.rand(2048, 2048), "bf16": torch.rand(2048, 2048).bfloat16()}
    blocks = {size: torch.ones(size * 125_000, dtype=torch.int64) for size in MEGABYTES}
    matrices = {name: torch.rand(6656, 2048).to(square.dtype) for name, square in squares.items()}
    vectors = {name: torch.rand(2048).to(square.dtype) for name, square in squares.items()}

    def fastest(action: contest.Action, tries: int) -> float:
        action()
        return min(contest.timed(action) for _ in range(tries))

    def play() -> dict[str, float]:
        numbers: dict[str, float] = {}
        for name, square in squares.items():
            numbers[f"gemm_{name}_gflops"] = 2 * 2048**3 / 1e9 / fastest(lambda square=square: square @ square, 3)
        for size, block in blocks.items():
            halves = block.view(torch.float32).chunk(2)
            reading = min(fastest(block.sum, 7), fastest(lambda halves=halves: torch.dot(*halves), 7))
            numbers[f"read_{size}_mb_gb_per_s"] = size / 1000 / reading
        for name, matrix in matrices.items():
            seconds = fastest(lambda name=name, matrix=matrix: matrix @ vectors[name], 5)
            numbers[f"matvec_{name}_gb_per_s"] = matrix.nbytes / 1e9 / seconds
        return numbers

    return play


LIMITS = contest.Contender("limits", measure, is_measure=True)


def main() -> None:
    """Measure, print and write."""
    options = contest.parser(__doc__).parse_args()
    if options.worker:
        contest.work([LIMITS], options.worker)
        return
    found = contest.race([LIMITS], {}, options)
    print(json.dumps(found, indent=1))
    contest.write("limits", {"threads": options.threads, **found})


if __name__ == "__main__":
    main()
