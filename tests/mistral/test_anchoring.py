"""Anchored losses against closed forms written in another way, and their gradients against differences."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vikhr_mistral.anchoring import AnchorConfig, chunked_losses, slerp_weight, token_losses

N, V, H = 7, 11, 5


@pytest.fixture
def case():
    """(logits, base logits, targets), float64."""
    generator = torch.Generator().manual_seed(0)
    logits, base = (3 * torch.randn(N, V, dtype=torch.float64, generator=generator) for _ in range(2))
    return logits.requires_grad_(), base, torch.randint(V, (N,), generator=generator)


def sphere_target(b: torch.Tensor, y: int, t: float) -> torch.Tensor:
    """The point at t on the great circle from √(one-hot) to √b, squared: Shoemake's formula, in vectors."""
    start, end = torch.zeros_like(b), b.sqrt()
    start[y] = 1.0
    omega = torch.arccos(torch.dot(start, end))
    point = (torch.sin((1 - t) * omega) * start + torch.sin(t * omega) * end) / torch.sin(omega)
    return point**2


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_slerp_is_the_cross_entropy_against_the_geodesic(case, t):
    logits, base, targets = case
    losses = token_losses(logits, targets, AnchorConfig("slerp", t), t, base)
    for i in range(N):
        b, y = base[i].softmax(-1), int(targets[i])
        target = sphere_target(b, y, t)
        assert target.min() >= 0
        torch.testing.assert_close(target.sum(), torch.ones((), dtype=torch.float64))
        torch.testing.assert_close(losses.loss[i], -(target * logits[i].log_softmax(-1)).sum())
        # The closed form of the target: cos²(tΩ) at y, sin²(tΩ) over the others in proportion to b.
        omega = math.acos(math.sqrt(b[y]))
        assert math.isclose(target[y], math.cos(t * omega) ** 2, rel_tol=1e-9)
        # Its distance from the data along the sphere is t of the whole way (Fisher's metric).
        assert math.isclose(math.acos(math.sqrt(target[y])), t * omega, abs_tol=1e-7)


@pytest.mark.parametrize("loss", ["none", "linear", "slerp"])
def test_t_0_is_cross_entropy_exactly(case, loss):
    logits, base, targets = case
    expected = F.cross_entropy(logits, targets, reduction="none")
    assert torch.equal(token_losses(logits, targets, AnchorConfig(loss, 0.0), 0.0, base).loss, expected)


def test_t_1_is_distillation_exactly(case):
    logits, base, targets = case
    log_m, b = logits.log_softmax(-1), base.softmax(-1)
    kl = F.kl_div(log_m, b, reduction="none").sum(-1)
    torch.testing.assert_close(token_losses(logits, targets, AnchorConfig("linear", 1.0), 1.0, base).loss, kl)
    reverse = F.kl_div(base.log_softmax(-1), log_m.exp(), reduction="none").sum(-1)
    config = AnchorConfig("linear", 1.0, direction="reverse")
    torch.testing.assert_close(token_losses(logits, targets, config, 1.0, base).loss, reverse)
    soft = F.cross_entropy(logits, b, reduction="none")  # torch's soft targets
    slerp = token_losses(logits, targets, AnchorConfig("slerp", 1.0), 1.0, base)
    torch.testing.assert_close(slerp.loss, soft)
    torch.testing.assert_close(slerp.distance, kl.detach())
    torch.testing.assert_close(slerp.weight, torch.ones(N, dtype=torch.float64))


def test_linear_mixes_and_temperature_is_hintons(case):
    logits, base, targets = case
    t, tau = 0.3, 2.5
    config = AnchorConfig("linear", t, temperature=tau)
    kl = F.kl_div((logits / tau).log_softmax(-1), (base / tau).softmax(-1), reduction="none").sum(-1)
    expected = (1 - t) * F.cross_entropy(logits, targets, reduction="none") + t * tau**2 * kl
    torch.testing.assert_close(token_losses(logits, targets, config, t, base).loss, expected)


@pytest.mark.parametrize("over", ["extended", "shared"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("loss", "direction"), [("linear", "forward"), ("linear", "reverse"), ("slerp", "forward")])
def test_gradients_against_differences(case, loss, direction, temperature, over):
    logits, base, targets = case
    config = AnchorConfig(loss, 0.4, None, "linear", temperature, direction, over, base_tokenizer="base")
    anchored = torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool()

    def objective(logits):
        return token_losses(logits, targets, config, 0.4, base, anchored, shared_size=8).loss

    assert torch.autograd.gradcheck(objective, (logits,), eps=1e-6, atol=1e-7)


def test_limits_are_finite():
    """b_y → 1 (Ω → 0): w = t². b_y → 0 (Ω → π/2): w = sin²(πt/2). Values and gradients stay finite in fp32."""
    t = 0.3
    log_b = torch.tensor([0.0, -1e-12, -1e-7, 1e-7, -200.0, -float("inf")])
    expected = [t**2] * 4 + [math.sin(math.pi * t / 2) ** 2] * 2
    torch.testing.assert_close(slerp_weight(t, log_b), torch.tensor(expected))
    exact = slerp_weight(t, log_b.double()[[1, 4]])
    torch.testing.assert_close(exact, torch.tensor(expected, dtype=torch.float64)[[0, 4]], atol=1e-12, rtol=1e-10)
    base = torch.zeros(2, V)
    base[0, 3], base[1, 3] = 200.0, -200.0
    logits = torch.randn(2, V, requires_grad=True)
    losses = token_losses(logits, torch.tensor([3, 3]), AnchorConfig("slerp", t), t, base)
    losses.loss.sum().backward()
    assert torch.isfinite(losses.loss).all()
    assert torch.isfinite(logits.grad).all()


def test_weight_grows_with_the_surprise_of_the_base():
    weights = slerp_weight(0.5, torch.log(torch.linspace(0.999, 0.001, 50, dtype=torch.float64)))
    assert (weights.diff() > 0).all()


def test_shared_compares_the_first_logits_of_anchored_tokens_only(case):
    logits, base, targets = case
    targets = targets.clamp(max=7)
    anchored = torch.tensor([1, 0, 1, 0, 0, 1, 1]).bool()
    config = AnchorConfig("linear", 0.5, over="shared", base_tokenizer="base")
    losses = token_losses(logits, targets, config, 0.5, base[:, :8], anchored, shared_size=8)
    cross_entropy = F.cross_entropy(logits, targets, reduction="none")  # over the whole vocabulary
    kl = F.kl_div(logits[:, :8].log_softmax(-1), base[:, :8].softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(losses.loss, torch.where(anchored, 0.5 * cross_entropy + 0.5 * kl, cross_entropy))
    more = torch.cat([logits[:, :8], logits[:, 8:] + 5], 1)  # what the base lacks changes the data's term alone
    moved = token_losses(more, targets, config, 0.5, base[:, :8], anchored, shared_size=8)
    torch.testing.assert_close(moved.distance, losses.distance)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_nothing(chunk):
    torch.manual_seed(0)
    head, base_head = (torch.nn.Linear(H, V, bias=False, dtype=torch.float64) for _ in range(2))
    hidden, base_hidden = torch.randn(N, H, dtype=torch.float64), torch.randn(N, H, dtype=torch.float64)
    targets, config = torch.randint(V, (N,)), AnchorConfig("slerp", 0.4)
    whole_in, parts_in = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    whole = token_losses(head(whole_in), targets, config, 0.4, base_head(base_hidden).detach())
    whole.loss.sum().backward()
    expected, head.weight.grad = head.weight.grad, None
    parts = chunked_losses(head, parts_in, targets, config, 0.4, base_head, base_hidden, chunk_tokens=chunk)
    parts.loss.sum().backward()
    for one, other in zip([*whole, whole_in.grad, expected], [*parts, parts_in.grad, head.weight.grad], strict=True):
        torch.testing.assert_close(one, other)
    assert base_head.weight.grad is None


def test_a_batch_without_targets_has_no_losses():
    """A process whose rows are all padding still takes part in the step."""
    head, none = torch.nn.Linear(H, V, bias=False), torch.zeros(0, dtype=torch.int64)
    losses = chunked_losses(head, torch.zeros(0, H, requires_grad=True), none, AnchorConfig())
    assert losses.loss.shape == (0,)
    losses.loss.sum().backward()
    assert not head.weight.grad.any()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, torch.Tensor):
                self.size = max(self.size, value.numel())
        return made


def test_no_tensor_of_all_tokens_by_the_vocabulary_in_either_pass():
    tokens, size, hidden_size, chunk = 256, 512, 8, 16
    head = torch.nn.Linear(hidden_size, size, bias=False)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    base = torch.randn(tokens, hidden_size)
    arguments = (head, hidden, torch.randint(size, (tokens,)), AnchorConfig("slerp", 0.5), 0.5, head, base)
    with Largest() as chunked:
        chunked_losses(*arguments, chunk_tokens=chunk).loss.sum().backward()
    assert chunked.size == chunk * size  # a chunk's logits; the head's weights are smaller
    with Largest() as whole:
        chunked_losses(*arguments, chunk_tokens=tokens).loss.sum().backward()
    assert whole.size == tokens * size


def test_the_schedule_of_t():
    config = AnchorConfig("linear", 0.8, t_end=0.2)
    assert [config.t_at(step, 5) for step in (0, 2, 4, 9)] == pytest.approx([0.8, 0.5, 0.2, 0.2])
    cosine = AnchorConfig("linear", 0.8, t_end=0.2, t_schedule="cosine")
    assert [cosine.t_at(step, 5) for step in (0, 2, 4)] == pytest.approx([0.8, 0.5, 0.2])
    assert cosine.t_at(1, 5) > config.t_at(1, 5)
    assert AnchorConfig("linear", 0.3).t_at(77, 100) == 0.3
    assert AnchorConfig("none", 0.3).t_at(0, 10) == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t": 1.5}, "t is 1.5"),
        ({"t_end": -0.1}, "t_end is -0.1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"loss": "slerp", "direction": "reverse"}, "slerp has no reverse"),
        ({"loss": "linear", "over": "shared"}, "needs base_tokenizer"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        AnchorConfig(**settings)
