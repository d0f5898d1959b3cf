"""Does cuDNN's attention give the same bits with and without its log-sum-exp on this GPU?

    python -m benchmarks.lse_bits [--out FILE.md]

`collect(lse="model")` asks for the log-sum-exp, which may make cuDNN choose another engine. The outputs of torch's
operator are compared on random inputs of several shapes, in bf16 and fp16. Equal bits here promise nothing for other
versions of cuDNN or other shapes.
"""

from pathlib import Path

import torch

from benchmarks.measure import environment, heading, make_parser, markdown_table, show

# (B, HQ, T, D)
SHAPES = (
    (1, 32, 8192, 128),
    (1, 32, 1024, 128),
    (2, 16, 2048, 128),
    (4, 14, 777, 64),
    (1, 32, 4096, 64),
    (8, 12, 512, 128),
    (1, 32, 16384, 128),
    (3, 9, 333, 64),
)


def differing(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Returns the share of the output's elements whose bits differ."""
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    without, beside = (attend(q, k, v, None, lse, 0.0, True, False)[0] for lse in (False, True))
    return (without != beside).float().mean().item()


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, help="write what is printed to this file as well")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("cuDNN's attention runs on a GPU, and there is none here")
    torch.manual_seed(0)
    rows = [
        [str(dtype).removeprefix("torch."), str(list(shape)), f"{differing(shape, dtype):.2%}"]
        for dtype in (torch.bfloat16, torch.float16)
        for shape in SHAPES
    ]
    where = heading(environment(torch.device("cuda")) | {"cudnn": str(torch.backends.cudnn.version())})
    show(f"{where}\n\n{markdown_table(['dtype', '[B, HQ, T, D]', 'differing elements'], rows)}", args.out)


if __name__ == "__main__":
    main()
