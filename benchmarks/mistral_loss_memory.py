"""Peak memory of the loss, forward and backward, whole and in chunks.

    python benchmarks/mistral_loss_memory.py                 8,192 tokens, vocabulary 40,000, hidden 1,024; CPU or GPU
    python benchmarks/mistral_loss_memory.py --tokens 2048

Each row is a process of its own: what the loss adds to the peak over its inputs, weights and their gradients.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def measure(loss: str, tokens: int, vocabulary: int, hidden_size: int, chunk: int) -> None:
    import torch

    from vikhr_mistral.anchoring import AnchorConfig, chunked_losses

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    head = torch.nn.Linear(hidden_size, vocabulary, bias=False, device=device)
    base_head = torch.nn.Linear(hidden_size, vocabulary, bias=False, device=device).requires_grad_(False)
    hidden = torch.randn(tokens, hidden_size, device=device, requires_grad=True)
    base = torch.randn(tokens, hidden_size, device=device) if loss != "none" else None
    targets = torch.randint(vocabulary, (tokens,), device=device)
    # What there is without the loss: gradients of the head (twice, while they are added up) and of its inputs.
    head.weight.grad, spare = torch.ones_like(head.weight), torch.ones_like(head.weight)
    hidden.grad = torch.ones_like(hidden)
    before = peak(device)
    del spare
    start = time.perf_counter()
    losses = chunked_losses(head, hidden, targets, AnchorConfig(loss, 0.3), 0.3, base_head, base, chunk_tokens=chunk)
    losses.loss.mean().backward()
    print(f"{peak(device) - before:.2f} {time.perf_counter() - start:.1f}")


def peak(device: str) -> float:
    """GiB so far."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=40000)
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = (options.tokens, options.vocabulary, options.hidden_size)
    if options.one:
        measure(options.one[0], *sizes, int(options.one[1]))
        return
    whole = options.tokens * options.vocabulary * 4 / 2**30
    print(f"[tokens, vocabulary] in fp32 is {whole:.2f} GiB")
    print("| loss | tokens in a chunk | added to the peak, GiB | seconds |\n|---|---|---|---|")
    arguments = ["--tokens", str(sizes[0]), "--vocabulary", str(sizes[1]), "--hidden_size", str(sizes[2])]
    for loss in ("none", "slerp"):
        for chunk in (sizes[0], 1024, 256):
            command = [sys.executable, __file__, *arguments, "--one", loss, str(chunk)]
            added, seconds = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            print(f"| {loss} | {chunk if chunk < sizes[0] else 'all'} | {added} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
