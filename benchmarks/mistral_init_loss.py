"""Loss on Russian right after the tokenizer was extended, by how the new rows were made.

    python benchmarks/mistral_init_loss.py --model gemma-3-270m --pages 10
    python benchmarks/mistral_tiny_base.py --output tiny --minutes 13
    python benchmarks/mistral_init_loss.py --model tiny --donor_size 5000

--model is a folder of a causal language model with a SentencePiece BPE tokenizer.model: Mistral, Llama 2, Gemma 3. Its
tokenizer gets pieces from the embedded Russian pages, its matrices rows from vikhr_mistral.embeddings, and the loss is
taken on held-out pages, with no training. All methods see the same tokens; nats per character compare with the base,
too. A tied matrix is copied first, so that input and output can take rows of different methods.

Next to the methods: "first" and "last" take the row of the first or last old piece alone, "plain mean" the mean of all
old rows, "random 0.02" N(0, 0.02), "random std" N(0, σ) with σ that of the old matrix (transformers'
mean_resizing=False draws with the configuration's initializer_range, 0.02 as a rule). FOCUS gets vectors from the same
pages: positive pointwise mutual information within five pieces, factored to 64 numbers (Levy & Goldberg 2014), where
the paper has fastText.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from mistral_tiny_base import pages
from transformers import AutoModelForCausalLM

from vikhr_mistral import donor as donors
from vikhr_mistral import embeddings, focus, merging, pieces

BLOCK, AT_ONCE = 256, 256
MEAN, WEIGHTED, EXPONENTIAL, NORMAL, FOCUS = embeddings.METHODS
FIRST, LAST, PLAIN, RANDOM, SPREAD = "first", "last", "plain mean", "random 0.02", "random std"
ROWS = (RANDOM, SPREAD, PLAIN, NORMAL, MEAN, WEIGHTED, FOCUS, EXPONENTIAL, FIRST, LAST)


@dataclasses.dataclass(frozen=True)
class Loss:
    """Nats, means over tokens; `mass` is the probability that new rows have together."""

    total: float
    characters: int
    tokens: int
    old_targets: float
    new_targets: float
    mass: float

    def __str__(self) -> str:
        per_character = self.total / self.characters
        per_token = f"{self.total / self.tokens:7.3f} /token {per_character:6.3f} /character"
        return f"{per_token}  new targets {self.new_targets:6.3f}, old {self.old_targets:6.3f}, mass {self.mass:.3f}"


def one_piece(plan: embeddings.Plan, last: bool) -> embeddings.Plan:
    """The plan with all weight on the first or the last old piece."""
    weights, used = np.zeros_like(plan.weights), np.flatnonzero(np.diff(plan.starts))
    weights[plan.starts[used + 1] - 1 if last else plan.starts[used]] = 1
    return dataclasses.replace(plan, weights=weights)


def make_rows(name: str, plans: dict[str, embeddings.Plan], old: np.ndarray, for_output: bool) -> np.ndarray:
    """[O, D] -> [V, D]."""
    if name in plans:
        return embeddings.new_rows(embeddings.for_output(plans[name], name) if for_output else plans[name], old, name)
    if name in (FIRST, LAST):
        return embeddings.new_rows(one_piece(plans[MEAN], name == LAST), old)
    plan, generator = plans[MEAN], np.random.default_rng(0)
    rows, made = embeddings.new_rows(plan, old), np.flatnonzero(plan.kinds != embeddings.KEPT)
    if name == PLAIN:
        rows[made] = old[: plan.old_size].mean(axis=0, dtype=np.float64)
    else:
        rows[made] = generator.normal(0, 0.02 if name == RANDOM else old.std(), (len(made), old.shape[1]))
    return rows


class Base:
    """A model with its own matrices, its tokenizer and the extended one, and held-out text in both.

    Attributes:
        embedding, head: [O, D]; ids: [T] of the text with new pieces.
    """

    def __init__(self, folder: str, donor_size: int, text: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.old, self.text = pieces.open_model(folder), text
        self.new = merging.merge(self.old, donors.train(pages("ru", False), self.old, donor_size)).model
        self.size, self.ids = len(self.old.pieces), pieces.encoder(self.new)(text)
        modules = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self.embedding, self.head = (module.weight.detach().numpy()[: self.size].copy() for module in modules)

    @torch.inference_mode()
    def states(self, embedding: np.ndarray, ids: list[int]) -> torch.Tensor:
        """[T, D]: before each token, from blocks that know nothing of one another."""
        self.model.get_input_embeddings().weight = torch.nn.Parameter(torch.from_numpy(embedding))
        start, found = self.old.trainer_spec.bos_id, []
        for first in range(0, len(ids), BLOCK):
            block = torch.tensor([[start, *ids[first : first + BLOCK]]])
            found.append(self.model.base_model(input_ids=block, use_cache=False).last_hidden_state[0, :-1])
        return torch.cat(found)

    @torch.inference_mode()
    def old_logits(self, states: torch.Tensor, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """([T] log Σ exp of the old pieces' logits, [T] the target's logit where that is an old piece)."""
        head, targets = torch.from_numpy(self.head), torch.tensor(ids).clamp(max=self.size - 1)
        sums, chosen = [], []
        for part, target in zip(states.split(AT_ONCE), targets.split(AT_ONCE), strict=True):
            logits = part @ head.T
            sums.append(logits.logsumexp(1))
            chosen.append(logits.gather(1, target[:, None])[:, 0])
        return torch.cat(sums), torch.cat(chosen)

    def base_loss(self) -> Loss:
        """Of the text in old pieces."""
        ids = pieces.encoder(self.old)(self.text)
        sums, target = self.old_logits(self.states(self.embedding, ids), ids)
        total = (sums - target).sum().item()
        return Loss(total, len(self.text), len(ids), total / len(ids), float("nan"), 0.0)

    @torch.inference_mode()
    def losses(self, embedding: np.ndarray, heads: dict[str, np.ndarray]) -> dict[str, Loss]:
        """Of the text in new pieces, by the method of the head's rows.

        embedding: [V, D]; heads: [V − O, D] each, the new rows.
        """
        states = self.states(embedding, self.ids)
        sums, old_target = self.old_logits(states, self.ids)
        ids, found = torch.tensor(self.ids), {}
        is_new = ids >= self.size
        for name, head in heads.items():
            logits = states @ torch.from_numpy(head).T
            new_target = logits.gather(1, (ids - self.size).clamp(min=0)[:, None])[:, 0]
            new_sums = logits.logsumexp(1)
            both = torch.logaddexp(sums, new_sums)
            nats = both - torch.where(is_new, new_target, old_target)
            found[name] = Loss(
                nats.sum().item(),
                len(self.text),
                len(ids),
                nats[~is_new].mean().item(),
                nats[is_new].mean().item(),
                (new_sums - both).exp().mean().item(),
            )
        return found


def write_vectors(path: Path, model: Any, texts: list[str], window: int = 5, width: int = 64) -> None:
    """A vector for each piece of the texts, in fastText's text format."""
    encode, size = pieces.encoder(model), len(model.pieces)
    counts = scipy.sparse.csr_matrix((size, size))
    for ids in map(np.array, map(encode, texts)):
        for distance in range(1, min(window + 1, len(ids))):
            pair = (ids[:-distance], ids[distance:])
            counts += scipy.sparse.coo_matrix((np.ones(len(pair[0])), pair), (size, size)).tocsr()
    counts = (counts + counts.T).tocoo()
    total = np.asarray(counts.sum(axis=0)).ravel()
    information = np.log(counts.data * total.sum() / (total[counts.row] * total[counts.col]))
    positive = scipy.sparse.csr_matrix((np.maximum(information, 0), (counts.row, counts.col)), (size, size))
    left, values, _ = scipy.sparse.linalg.svds(positive, width, rng=np.random.default_rng(0))
    vectors, used = left * np.sqrt(values), np.flatnonzero(total)
    lines = [" ".join([model.pieces[id].piece, *(f"{value:.6g}" for value in vectors[id])]) for id in used]
    path.write_text("\n".join([f"{len(used)} {width}", *lines]) + "\n", encoding="utf-8")


def compare(folder: str, donor_size: int, num_pages: int, methods: Sequence[str]) -> dict[tuple[str, str], Loss]:
    """(method of the embedding, method of the head) -> loss; printed as it comes."""
    base = Base(folder, donor_size, "\n\n".join(pages("ru", True)[:num_pages]))
    stated = [name for name in embeddings.METHODS if name in methods or name == MEAN]
    plans = {name: embeddings.plan(base.old, base.new, name) for name in stated}
    if FOCUS in methods:
        with tempfile.TemporaryDirectory() as temporary:
            write_vectors(Path(temporary) / "pieces.vec", base.new, pages("ru", False))
            plans[FOCUS] = focus.focused(plans[FOCUS], base.new, Path(temporary) / "pieces.vec")
    made = plans[MEAN].kinds == embeddings.MADE
    print(f"{folder}: {base.size:,} pieces, {made.sum():,} new ones of {np.diff(plans[MEAN].starts)[made].mean():.2f}")
    print(f"σ of the embedding {base.embedding.std():.3f}, of the head {base.head.std():.3f}")
    print(
        f"{len(base.text):,} characters, {len(base.ids):,} tokens, new: {np.mean(np.array(base.ids) >= base.size):.2f}"
    )
    print(f"{'base, its own tokens':25} {base.base_loss()}", flush=True)
    heads = {name: make_rows(name, plans, base.head, for_output=True)[base.size :].copy() for name in methods}
    found = {}
    for name in methods:
        embedding = make_rows(name, plans, base.embedding, for_output=False)
        for head, loss in base.losses(embedding, heads).items():
            found[name, head] = loss
            print(f"{name:13} / {head:13} {loss}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--donor_size", type=int, default=20_000)
    parser.add_argument("--pages", type=int, default=20, help="held-out pages to measure on")
    parser.add_argument("--methods", nargs="+", choices=ROWS, default=ROWS, metavar="M", help="default: all")
    flags = parser.parse_args()
    compare(flags.model, flags.donor_size, flags.pages, flags.methods)


if __name__ == "__main__":
    main()
