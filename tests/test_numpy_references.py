"""Every published formula once more in plain numpy, from its paper and on padded rows, against the
package on 50 ragged batches each.

Losses: value to 1e-7 (weights of tokens are float32, the rest float64), gradient against central
    differences of the numpy value (step 1e-6,
to 1e-6; batches keep clear of the kinks), and micro-batches cut between responses add up to the
whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from rlfr_vlm.algorithm import advantages as adv
from rlfr_vlm.algorithm import losses
from rlfr_vlm.algorithm.shaping import likelihood_scores, shape_by_entropy
from rlfr_vlm.flow.reward import flow_reward

SEEDS = range(50)
STEP, GAP = 1e-6, 1e-4
MAX_TOKENS = 12
LOW, HIGH, DUAL, CAP, BETA, KL_COEF, VALUE_CLIP, GEOMETRIC = (
    0.2,
    0.28,
    1.6,
    1.3,
    15.0,
    0.3,
    0.2,
    (0.4, 0.5),
)


class Batch:
    """B responses of 1 to 9 tokens, one of them of a single token; [B, T] in numpy, with noise in
    the padding.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        while True:
            self._draw(rng)
            if self._clear_of_kinks():
                break

    def _draw(self, rng) -> None:
        size = int(rng.integers(2, 6))
        self.lengths = rng.integers(1, 10, size)
        self.lengths[rng.integers(size)] = 1
        self.mask = np.arange(self.lengths.max()) < self.lengths[:, None]
        shape = self.mask.shape
        self.old = -rng.exponential(1.0, shape)
        self.new = self.old + rng.normal(0, 0.5, shape)
        self.ref, self.rollout = self.old + rng.normal(0, 0.3, (2, *shape))
        self.advantages = rng.normal(0, 1, shape)
        self.entropy = rng.exponential(1.0, shape)
        self.outcome, self.log_z = rng.normal(0, 1, (2, size))
        self.values, self.old_values, self.returns = rng.normal(0, 0.3, (3, *shape))

    def _clear_of_kinks(self) -> bool:
        ratio = np.exp(self.new - self.old)
        sequence = np.exp(mean(self.new - self.old, self.mask))
        near_clip = [
            np.abs(r - bound) for r in (ratio, sequence) for bound in (1 - LOW, 1 + HIGH, DUAL)
        ]
        near_clip += [np.abs(np.log(ratio) + GEOMETRIC[0]), np.abs(np.log(ratio) - GEOMETRIC[1])]
        moved = np.clip(self.values - self.old_values, -VALUE_CLIP, VALUE_CLIP) + self.old_values
        near_clip += [np.abs(np.abs(self.values - self.old_values) - VALUE_CLIP)]
        tie = np.abs(np.abs(self.values - self.returns) - np.abs(moved - self.returns))[
            moved != self.values
        ]
        return min(x.min(initial=1.0) for x in (*near_clip, tie)) > GAP

    def flat(self, values: np.ndarray, rows: slice = slice(None)) -> torch.Tensor:
        """Real tokens of some responses end to end; of per-response numbers, those of the
        responses.
        """
        return torch.tensor(values[rows][self.mask[rows]] if values.ndim == 2 else values[rows])

    def repeated(self, values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values[:, None], self.mask.shape)


def mean(x, mask):
    """Mean over the real tokens of each row."""
    return np.where(mask, x, 0).sum(1) / mask.sum(1)


# --- the losses as their papers have them: (new log-probs or values [B, T], batch) -> loss


def over_tokens(x, mask):  # DAPO, eq. 8
    return x[mask].sum() / mask.sum()


def over_sequences(x, mask):  # GRPO, eq. 3
    return np.mean([row[m].mean() for row, m in zip(x, mask, strict=True)])


def over_budget(x, mask):  # Dr. GRPO
    return np.mean([row[m].sum() / MAX_TOKENS for row, m in zip(x, mask, strict=True)])


def surrogate(new, batch, advantages, low=LOW, high=LOW, dual=None):
    """PPO, eq. 7; dual clip, arXiv:1912.09729, eq. 5."""
    ratio = np.exp(new - batch.old)
    value = np.minimum(ratio * advantages, np.clip(ratio, 1 - low, 1 + high) * advantages)
    return (
        value
        if dual is None
        else np.where(advantages < 0, np.maximum(value, dual * advantages), value)
    )


def gspo(new, batch):
    """arXiv:2507.18071, eq. 5 and 7: one ratio, one clip and one advantage per sequence."""
    total = 0.0
    for row, old, mask, advantage in zip(new, batch.old, batch.mask, batch.outcome, strict=True):
        ratio = (np.exp(row[mask].sum()) / np.exp(old[mask].sum())) ** (1 / mask.sum())
        total += min(ratio * advantage, np.clip(ratio, 1 - LOW, 1 + HIGH) * advantage)
    return -total / len(new)


def cispo(new, batch):
    """arXiv:2506.13585, eq. 4 and 5 without a lower bound. The weight is that of the batch: it
    stays as it is while `new` moves.
    """
    weight = np.minimum(np.exp(batch.new - batch.old), 1 + HIGH)
    return -over_tokens(weight * batch.advantages * new, batch.mask)


def gmpo(new, batch):
    """arXiv:2507.20673, eq. 4: the geometric mean of ratios, each clipped on the side that the sign
    of the advantage says.
    """
    total = 0.0
    for row, old, mask, advantage in zip(new, batch.old, batch.mask, batch.outcome, strict=True):
        product, sign = 1.0, np.sign(advantage)
        for ratio in np.exp(row[mask] - old[mask]):
            clipped = min(max(ratio, np.exp(-GEOMETRIC[0])), np.exp(GEOMETRIC[1]))
            product *= min(ratio**sign, clipped**sign) ** sign
        total += product ** (1 / mask.sum()) * advantage
    return -total / len(new)


def flowrl(new, batch, log_z=None):
    """arXiv:2509.15207, eq. 6. The importance weight is that of the batch: it stays as it is while
    `new` moves.
    """
    log_z = batch.log_z if log_z is None else log_z
    weight = np.clip(
        [
            np.prod(np.exp(n[m] - o[m]))
            for n, o, m in zip(batch.new, batch.old, batch.mask, strict=True)
        ],
        1 - LOW,
        1 + HIGH,
    )
    residual = log_z + mean(new, batch.mask) - BETA * batch.outcome - mean(batch.ref, batch.mask)
    return np.mean(weight * residual**2)


def value(new, batch):
    """PPO's clipped value loss as in OpenRLHF: one half of the worse squared error, over tokens."""
    near = np.clip(new, batch.old_values - VALUE_CLIP, batch.old_values + VALUE_CLIP)
    return 0.5 * over_tokens(
        np.maximum((new - batch.returns) ** 2, (near - batch.returns) ** 2), batch.mask
    )


def divergence(new, batch, estimator):
    """http://joschu.net/blog/kl-approx.html with r = pi_ref / pi."""
    log_r = batch.ref - new
    return {"k1": -log_r, "k2": log_r**2 / 2, "k3": np.exp(log_r) - 1 - log_r}[estimator]


def entropy_bonus(batch):
    """arXiv:2506.14758: psi(H) = min(alpha H, |A| / kappa) with alpha 0.4, kappa 2."""
    return batch.advantages + np.minimum(0.4 * batch.entropy, np.abs(batch.advantages) / 2)


def importance(batch):
    """Truncated importance of the sampler: min(pi_old / pi_rollout, cap)."""
    return np.minimum(np.exp(batch.old) / np.exp(batch.rollout), CAP)


# --- and as the package has them: (new log-probs or values [N], batch, some of its responses) ->
# their share of the loss


def weights(batch, rows, aggregation):
    return losses.token_weights(
        torch.tensor(batch.lengths[rows]),
        aggregation,
        int(batch.mask.sum()),
        len(batch.mask),
        MAX_TOKENS,
    )


def our_clip(aggregation, clips=(LOW, LOW), dual=None, credit: Callable | None = None):
    def loss(new, batch, rows):
        given = credit(batch, rows) if credit else batch.flat(batch.advantages, rows)
        return losses.policy_loss(
            new - batch.flat(batch.old, rows),
            given,
            weights(batch, rows, aggregation),
            *clips,
            dual,
        )[0]

    return loss


def our_gspo(new, batch, rows):
    lengths = torch.tensor(batch.lengths[rows])
    ratio = losses.sequence_log_ratio(new - batch.flat(batch.old, rows), lengths)
    given = batch.flat(batch.repeated(batch.outcome), rows)
    return losses.policy_loss(ratio, given, weights(batch, rows, "sequence"), LOW, HIGH)[0]


def our_cispo(new, batch, rows):
    return losses.cispo_loss(
        new,
        new - batch.flat(batch.old, rows),
        batch.flat(batch.advantages, rows),
        weights(batch, rows, "token"),
        HIGH,
    )[0]


def our_gmpo(new, batch, rows):
    given = batch.flat(batch.repeated(batch.outcome), rows)
    lengths = torch.tensor(batch.lengths[rows])
    return losses.gmpo_loss(
        new - batch.flat(batch.old, rows), given, lengths, len(batch.mask), *GEOMETRIC
    )[0]


def our_flowrl(new, batch, rows, log_z=None):
    columns = (batch.flat(x, rows) for x in (batch.old, batch.ref, batch.log_z, batch.outcome))
    old, ref, own, outcome = columns
    lengths = torch.tensor(batch.lengths[rows])
    return losses.flowrl_loss(
        new,
        old,
        ref,
        own if log_z is None else log_z,
        outcome,
        lengths,
        len(batch.mask),
        BETA,
        LOW,
        HIGH,
    )[0]


def our_value(new, batch, rows):
    old, returns = batch.flat(batch.old_values, rows), batch.flat(batch.returns, rows)
    return losses.value_loss(new, old, returns, weights(batch, rows, "token"), VALUE_CLIP)[0]


def our_kl(estimator):
    def loss(new, batch, rows):
        penalty = losses.kl_estimate(new, batch.flat(batch.ref, rows), estimator)
        return (
            our_clip("sequence")(new, batch, rows)
            + KL_COEF * (weights(batch, rows, "sequence") * penalty).sum()
        )

    return loss


def our_entropy(batch, rows):
    return shape_by_entropy(batch.flat(batch.advantages, rows), batch.flat(batch.entropy, rows))


def our_importance(batch, rows):
    old, rollout = batch.flat(batch.old, rows), batch.flat(batch.rollout, rows)
    return batch.flat(batch.advantages, rows) * losses.truncated_importance(old, rollout, CAP)


@dataclass(frozen=True)
class Pair:
    paper: Callable
    ours: Callable
    at: str = "new"


PAIRS = {
    "ppo_token": Pair(lambda x, b: -over_tokens(surrogate(x, b, b.advantages), b.mask), our_clip("token")),
    "grpo_sequence": Pair(lambda x, b: -over_sequences(surrogate(x, b, b.advantages), b.mask), our_clip("sequence")),
    "dr_grpo": Pair(lambda x, b: -over_budget(surrogate(x, b, b.advantages), b.mask), our_clip("constant")),
    "dapo": Pair(lambda x, b: -over_tokens(surrogate(x, b, b.advantages, LOW, HIGH), b.mask), our_clip("token", (LOW, HIGH))),
    "dual_clip": Pair(
        lambda x, b: -over_tokens(surrogate(x, b, b.advantages, dual=DUAL), b.mask), our_clip("token", dual=DUAL)
    ),
    "cispo": Pair(cispo, our_cispo),
    "gspo": Pair(gspo, our_gspo),
    "gmpo": Pair(gmpo, our_gmpo),
    "flowrl": Pair(flowrl, our_flowrl),
    "value": Pair(value, our_value, "values"),
    **{
        f"kl_{k}": Pair(
            lambda x, b, k=k: over_sequences(KL_COEF * divergence(x, b, k) - surrogate(x, b, b.advantages), b.mask), our_kl(k)
        )
        for k in ("k1", "k2", "k3")
    },
    "entropy_shaping": Pair(lambda x, b: -over_tokens(surrogate(x, b, entropy_bonus(b)), b.mask), our_clip("token", credit=our_entropy)),
    "truncated_importance": Pair(
        lambda x, b: -over_tokens(importance(b) * surrogate(x, b, b.advantages), b.mask), our_clip("token", credit=our_importance)
    ),
}  # fmt: skip
ALL = slice(None)


def differences(function, x):
    """Central differences of function(x) at every element."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += STEP
        down[index] -= STEP
        gradient[index] = (function(up) - function(down)) / (2 * STEP)
    return gradient


def ours(pair, batch, rows=ALL):
    new = batch.flat(getattr(batch, pair.at), rows).requires_grad_()
    loss = pair.ours(new, batch, rows)
    loss.backward()
    return loss.item(), new.grad.numpy()


@pytest.mark.parametrize("name", PAIRS)
def test_losses_and_gradients(name):
    pair = PAIRS[name]
    for seed in SEEDS:
        batch = Batch(seed)
        point = getattr(batch, pair.at)
        loss, gradient = ours(pair, batch)
        expected = differences(lambda x, b=batch: pair.paper(x, b), point)
        assert loss == pytest.approx(pair.paper(point, batch), rel=1e-7, abs=1e-7), seed
        assert np.allclose(gradient, expected[batch.mask], rtol=1e-6, atol=1e-6), seed
        assert not expected[~batch.mask].any(), seed


@pytest.mark.parametrize("name", PAIRS)
def test_micro_batches_add_up(name):
    for seed in SEEDS:
        batch = Batch(seed)
        cut = 1 + seed % (len(batch.mask) - 1)
        loss, gradient = ours(PAIRS[name], batch)
        parts = [ours(PAIRS[name], batch, rows) for rows in (slice(0, cut), slice(cut, None))]
        assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-12), seed
        assert np.allclose(
            np.concatenate([part for _, part in parts]), gradient, rtol=1e-12, atol=1e-15
        ), seed


def test_flowrl_gradient_of_the_partition_function():
    for seed in SEEDS:
        batch = Batch(seed)
        log_z = batch.flat(batch.log_z).requires_grad_()
        our_flowrl(batch.flat(batch.new), batch, ALL, log_z).backward()
        expected = differences(lambda x, b=batch: flowrl(b.new, b, x), batch.log_z)
        assert np.allclose(log_z.grad.numpy(), expected, rtol=1e-6, atol=1e-6), seed


def test_gspo_token_advantages_keep_their_place():
    """GSPO-token, arXiv:2507.18071, eq. 13 to 17: with advantages of single tokens each gradient is
    s_b A_t / (B |y_b|) where not clipped.
    """
    for seed in SEEDS:
        batch = Batch(seed)
        new = batch.flat(batch.new).requires_grad_()
        ratio = losses.sequence_log_ratio(new - batch.flat(batch.old), torch.tensor(batch.lengths))
        loss, _ = losses.policy_loss(
            ratio, batch.flat(batch.advantages), weights(batch, ALL, "sequence"), LOW, HIGH
        )
        loss.backward()
        s = np.exp(mean(batch.new - batch.old, batch.mask))[:, None]
        inside = np.where(batch.advantages > 0, s < 1 + HIGH, s > 1 - LOW)
        expected = -1.0 * inside * s * batch.advantages / (len(s) * batch.lengths[:, None])
        assert np.allclose(new.grad.numpy(), expected[batch.mask], rtol=1e-6), seed
        value = np.minimum(s * batch.advantages, np.clip(s, 1 - LOW, 1 + HIGH) * batch.advantages)
        assert loss.item() == pytest.approx(-over_sequences(value, batch.mask), abs=1e-6), seed


# --- advantages and returns


@pytest.mark.parametrize("kind", ["group", "centred", "leave_one_out"])
def test_outcome_advantages(kind):
    """GRPO, Dr. GRPO and RLOO over the graded responses of each group; zero for the others, for
    lone ones and for equal rewards.
    """
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        group, graded = rng.integers(0, 4, 16), rng.random(16) > 0.2
        reward = rng.choice([0, 0.1, 0.5, 1, 1.5], 16) if seed % 2 else rng.normal(0, 1, 16)
        reward[group == 3] = 0.7
        expected = np.zeros(16)
        for i in np.flatnonzero(graded):
            siblings = np.flatnonzero((group == group[i]) & graded)
            others, rewards = siblings[siblings != i], reward[siblings]
            if len(others) and rewards.max() > rewards.min():
                baseline = reward[others].mean() if kind == "leave_one_out" else rewards.mean()
                expected[i] = (reward[i] - baseline) / (
                    np.std(rewards, ddof=1) if kind == "group" else 1
                )
        arguments = (torch.tensor(reward), torch.tensor(graded), torch.tensor(group))
        found = (
            adv.leave_one_out(*arguments)
            if kind == "leave_one_out"
            else adv.group_advantages(*arguments, kind == "group")
        )
        assert np.allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6), (
            seed
        )  # returned in float32


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_rewards_to_go(gamma):
    for seed in SEEDS:
        batch = Batch(seed)
        lengths = torch.tensor(batch.lengths)
        expected = np.zeros(batch.mask.shape)
        for b, t in np.ndindex(*batch.mask.shape):
            expected[b, t] = sum(
                gamma ** (s - t) * batch.values[b, s] for s in range(t, batch.lengths[b])
            )
        found = adv.rewards_to_go(batch.flat(batch.values), lengths, gamma)
        assert np.allclose(found.numpy(), expected[batch.mask], rtol=1e-12), seed


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.99, 0.0)])
def test_gae_and_whitening(gamma, lam):
    """GAE, eq. 11 and 16: A_t = sum_l (gamma lambda)^l delta_{t+l}; PPO whitens with the population
    std.
    """
    for seed in SEEDS:
        batch = Batch(seed)
        expected = np.zeros(batch.mask.shape)
        for b, length in enumerate(batch.lengths):
            own = np.append(batch.old_values[b, :length], 0.0)
            delta = batch.values[b, :length] + gamma * own[1:] - own[:-1]
            expected[b, :length] = [
                sum((gamma * lam) ** n * d for n, d in enumerate(delta[t:])) for t in range(length)
            ]
        lengths = torch.tensor(batch.lengths)
        found, returns = adv.gae(
            batch.flat(batch.values), batch.flat(batch.old_values), lengths, gamma, lam
        )
        assert np.allclose(found.numpy(), expected[batch.mask], rtol=1e-10), seed
        assert np.allclose(
            returns.numpy(), (expected + batch.old_values)[batch.mask], rtol=1e-10
        ), seed
        whitened = (expected[batch.mask] - expected[batch.mask].mean()) / expected[batch.mask].std()
        assert np.allclose(adv.whiten(found).numpy(), whitened, rtol=1e-9, atol=1e-12), seed


# --- from scores to token rewards


def row_rewards(scores, valid, coef, normalise, threshold, top_k, gamma):
    """METHOD of arXiv:2510.10201 for one row of Python numbers: rescale, power, threshold, top-k
    with the earlier of equals.
    """
    places = [t for t in range(len(scores)) if valid[t]]
    reward = [0.0] * len(scores)
    if len(places) < 2 or len({scores[t] for t in places}) == 1:
        return reward
    low, high = min(scores[t] for t in places), max(scores[t] for t in places)
    n = {t: (scores[t] - low) / (high - low) for t in places}
    if normalise == "bilateral":
        n = {t: 2 * x - 1 for t, x in n.items()}
    if normalise == "mean":
        centre = sum(n.values()) / len(n)
        n = {t: x - centre for t, x in n.items()}
    n = {t: np.sign(x) * abs(x) ** gamma for t, x in n.items()}
    kept = {
        t: x
        for t, x in n.items()
        if x != 0 and (threshold <= 0 or (x if normalise == "minmax" else abs(x)) > threshold)
    }
    if 0 < top_k <= len(kept):
        strongest = sorted(kept, key=lambda t: (-abs(kept[t]), t))
        if normalise == "minmax":
            chosen = strongest[:top_k]
        else:
            chosen = [t for t in strongest if kept[t] > 0][: top_k // 2] + [
                t for t in strongest if kept[t] < 0
            ][: top_k // 2]
        kept = {t: kept[t] for t in chosen}
    for t, x in kept.items():
        reward[t] = -coef * x
    return reward


@pytest.mark.parametrize("normalise", ["minmax", "bilateral", "mean"])
@pytest.mark.parametrize("source", ["deviations", "surprisal"])
def test_token_rewards(normalise, source):
    """Half of the batches have whole-number scores, full of ties; on odd ones some tokens have no
    context.
    """
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 30, 4)
        lengths[seed % 4] = 1
        total = int(lengths.sum())
        scores = (
            rng.integers(0, 7, total).astype(float) if seed % 2 else rng.exponential(1.0, total)
        )
        valid = rng.random(total) > (0.2 if seed % 3 else 0)
        threshold, gamma = (
            (rng.uniform(0, 0.7), rng.choice([1.0, 0.5, 2.0])) if seed % 5 else (0.0, 1.0)
        )
        if seed % 7 == 1 and normalise != "mean":  # exactly on a score
            threshold, gamma = 0.5, 1.0
        settings = (
            0.01,
            normalise,
            float(threshold),
            int(rng.choice([0, 2, 3, 5, 15])),
            float(gamma),
        )
        given = (
            torch.tensor(scores)
            if source == "deviations"
            else likelihood_scores(-torch.tensor(scores), torch.zeros(total), "surprisal")
        )
        found = flow_reward(given, torch.tensor(valid), torch.tensor(lengths), *settings)
        cuts = np.cumsum(lengths)[:-1]
        expected = [
            row_rewards(s, v, *settings)
            for s, v in zip(np.split(scores, cuts), np.split(valid, cuts), strict=True)
        ]
        assert np.allclose(found.numpy(), np.concatenate(expected), rtol=1e-9, atol=1e-12), seed
        assert torch.equal(
            flow_reward(given * 4, torch.tensor(valid), torch.tensor(lengths), *settings), found
        ), seed
