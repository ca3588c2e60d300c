"""Reference formulas of the #1855 model and of its optimizer, in plain numpy float64.

Written from the published formulas alone, not from train_gpt.py, so that a misreading there fails a test.
Explicit loops over positions and heads: for tiny configurations only.
Sources: PR #1855 (model, Muon, Polar Express); modded-nanogpt PRs #264 (learned XSA), #169 (key offset), and
#337 (prefix tokens); modded-nanogpt for NorMuon, cautious weight decay, and the EMA-Nesterov wrapper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

BOS = 1
EPS = float(np.finfo(np.float32).eps)  # of every RMS norm
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
QUINTIC = [(3.4445, -4.775, 2.0315)] * 5


# ----------------------------------------------------------------------------------------------------------
# Order of the blocks and U-Net skips
# ----------------------------------------------------------------------------------------------------------


class Application(NamedTuple):
    """One evaluation of a block: where its parameters come from, and what happens before it."""

    row: int  # bank row; also the layer index of the norm scale, of XSA, and of the lanes' lambdas
    block: int  # the block's number in the state names, blocks.{block}
    decoder_step: int | None  # None in the first half; otherwise j, the row of skip_weights and skip_gates
    skip_from: int | None  # index of the application whose output is blended in first
    lanes: bool  # runs on two lanes


def schedule(c: Any, looped: bool = True) -> list[Application]:
    """Applications in order. The first floor(n / 2) are the encoder, the rest the decoder."""
    full_order = [int(row) for row in c.block_order.split(",")] if c.block_order else [*range(c.num_layers)]
    own_blocks = len(set(full_order)) < len(full_order) and not c.loop_shared
    uses = [(row, use if own_blocks else row) for use, row in enumerate(full_order)]
    if not looped:  # first use of every bank row
        uses = [use for i, use in enumerate(uses) if use[0] not in full_order[:i]]
    skip_rows = len(full_order) // 2

    encoder_length = len(uses) // 2
    applications: list[Application] = []
    stack: list[int] = []
    lanes = False
    for i, (row, block) in enumerate(uses):
        if i < encoder_length:
            applications.append(Application(row, block, None, None, False))
            stack.append(i)
            continue
        j = i - encoder_length
        skip_from = stack.pop() if c.unet_skips and stack and j < skip_rows else None
        lanes = lanes or (c.parallel_start_layer > 0 and row >= c.parallel_start_layer)
        applications.append(Application(row, block, j, skip_from, lanes))
    return applications


# ----------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def rms(x: np.ndarray) -> np.ndarray:
    """RMS norm over the last axis, without gain."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)


def rotate(x: np.ndarray, c: Any) -> np.ndarray:
    """Rotary embedding of x (T, heads, D): half-split pairs (i, i + R/2) of the first R dimensions."""
    T, heads, D = x.shape
    R = c.rope_dims or D
    out = x.copy()
    for t in range(T):
        for i in range(R // 2):
            angle = t * c.rope_base ** (-2.0 * i / R)
            cos, sin = math.cos(angle), math.sin(angle)
            for head in range(heads):
                a, b = x[t, head, i], x[t, head, i + R // 2]
                out[t, head, i] = a * cos + b * sin
                out[t, head, i + R // 2] = b * cos - a * sin
    return out


def embed(state: Mapping[str, np.ndarray], c: Any, ids: np.ndarray) -> np.ndarray:
    """Normed embeddings (T, d) of one row of ids (T,), with the token smear on the raw embeddings."""
    raw = state["tok_emb.weight"][ids]
    smeared = raw.copy()
    n = c.smear_inputs
    if n:
        weight, smear_lambda = state["smear_gate.weight"][0], state["smear_lambda"][0]
        for t in range(1, len(ids)):
            if ids[t] != BOS:
                smeared[t] += smear_lambda * sigmoid(weight @ raw[t, :n]) * raw[t - 1]
    return rms(smeared)


def attend(
    state: Mapping[str, np.ndarray], c: Any, at: Application, h: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    """Attention output (T, d) for the normed and scaled input h (T, d), before attn_scale."""
    L, H, K = c.num_layers, c.num_heads, c.num_kv_heads
    T, d = h.shape
    D = d // H
    name = f"blocks.{at.block}.attn."

    q = (h @ state["qo_bank"][at.row].T).reshape(T, H, D)
    k = (h @ state["kv_bank"][at.row].T).reshape(T, K, D)
    v = (h @ state["kv_bank"][L + at.row].T).reshape(T, K, D)
    q = rotate(rms(q), c) * state[name + "q_gain"][None, :, None]
    k = rotate(rms(k), c)
    if c.key_offset:
        unshifted = k
        k = unshifted.copy()
        for t in range(T):
            starts_document = t == 0 or ids[t] == BOS
            k[t, :, c.key_offset :] = 0.0 if starts_document else unshifted[t - 1, :, c.key_offset :]

    if c.doc_borders == "attention":
        document = np.cumsum(ids == BOS)
    elif c.doc_borders == "respect":
        document = np.zeros(T, dtype=int)
    else:
        raise ValueError(f"error: the reference model has no DOC_BORDERS={c.doc_borders}.")

    y = np.zeros((T, H, D))
    for head in range(H):
        kv_head = head // (H // K)
        for t in range(T):
            visible = [s for s in range(t + 1) if document[s] == document[t]]
            scores = np.array([q[t, head] @ k[s, kv_head] / math.sqrt(D) for s in visible])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            for s, weight in zip(visible, weights, strict=True):
                y[t, head] += weight * v[s, kv_head]

            if at.row >= L - c.xsa_last_n:
                value = v[t, kv_head]
                alpha = np.tanh(state[name + "xsa_alpha"][head]) if c.xsa_learned else 1.0
                y[t, head] -= alpha * (y[t, head] @ value) / max(value @ value, 1e-24) * value
            if c.attn_gate:
                gate = state[name + "attn_gate_w"][head] @ h[t, : c.attn_gate]
                y[t, head] *= sigmoid(c.attn_gate_scale * gate)
    return y.reshape(T, d) @ state["qo_bank"][L + at.row].T


def mlp(state: Mapping[str, np.ndarray], c: Any, at: Application, h: np.ndarray) -> np.ndarray:
    """MLP output (T, d) for the normed and scaled input h (T, d), before mlp_scale."""
    z = h @ state["mlp_up_bank"][at.row].T
    z = np.where(z > 0, z, c.mlp_leaky_slope * z) ** 2
    return z @ state["mlp_down_bank"][at.row].T


def forward_row(state: Mapping[str, np.ndarray], c: Any, ids: np.ndarray, looped: bool) -> np.ndarray:
    """Logits (T, V) of one row of ids (T,)."""
    x0 = embed(state, c, ids)
    x = x0
    lane0 = lane1 = None
    outputs: list[np.ndarray | None] = []  # of every application, for the skips; None on lanes

    for at in schedule(c, looped):
        name = f"blocks.{at.block}."
        norm_scale = 1.0 / math.sqrt(at.row + 1) if c.ln_scale else 1.0
        if at.lanes and lane0 is None:
            lane0 = lane1 = x
        stream = lane0 if at.lanes else x

        if at.skip_from is not None:
            skip = state["skip_weights"][at.decoder_step] * outputs[at.skip_from]
            if c.skip_gates:
                gate = sigmoid(state["skip_gates"][at.decoder_step])
                stream = (1.0 - gate) * skip + gate * stream
            else:
                stream = stream + skip

        mixed = stream
        if c.resid_mix:
            mix = state[name + "resid_mix"]
            mixed = mix[0] * stream + mix[1] * x0
        a = state[name + "attn_scale"] * attend(state, c, at, norm_scale * rms(mixed), ids)

        if at.lanes:
            b = state[name + "mlp_scale"] * mlp(state, c, at, norm_scale * rms(lane1))
            post = state["parallel_post_lambdas"][at.row]  # (producer, lane)
            resid = state["parallel_resid_lambdas"][at.row]
            lane0 = resid[0] * stream + post[0, 0] * a + post[1, 0] * b
            lane1 = resid[1] * lane1 + post[0, 1] * a + post[1, 1] * b
            outputs.append(None)
        else:
            x = mixed + a
            x = x + state[name + "mlp_scale"] * mlp(state, c, at, norm_scale * rms(x))
            outputs.append(x)

    if lane0 is not None:
        x = 0.5 * (lane0 + lane1)
    logits = rms(x) @ state["tok_emb.weight"].T
    return c.logit_softcap * np.tanh(logits / c.logit_softcap) if c.logit_softcap else logits


def forward(state: Mapping[str, np.ndarray], c: Any, ids: np.ndarray, looped: bool = True) -> np.ndarray:
    """Logits (B, T, V) of the #1855 model for ids (B, T).

    state maps state-dict names to arrays. c is any object with the model settings. looped=False applies every
    bank row once, in order of first use.
    """
    state = {name: np.asarray(value, dtype=np.float64) for name, value in state.items()}
    check_shapes(state, c)
    return np.stack([forward_row(state, c, row, looped) for row in np.asarray(ids)])


def check_shapes(state: Mapping[str, np.ndarray], c: Any) -> None:
    """Assert the shapes of the parameters that the settings call for."""
    L, d, H, K = c.num_layers, c.model_dim, c.num_heads, c.num_kv_heads
    m, kv_dim = int(c.mlp_mult * d), K * (d // H)
    applications = schedule(c)
    shapes: dict[str, tuple[int, ...]] = {
        "qo_bank": (2 * L, d, d),
        "kv_bank": (2 * L, kv_dim, d),
        "mlp_up_bank": (L, m, d),
        "mlp_down_bank": (L, d, m),
        "tok_emb.weight": (len(state["tok_emb.weight"]), d),
    }
    for at in applications:
        name = f"blocks.{at.block}."
        shapes |= {name + "attn_scale": (d,), name + "mlp_scale": (d,), name + "attn.q_gain": (H,)}
        if c.resid_mix:
            shapes[name + "resid_mix"] = (2, d)
        if c.attn_gate:
            shapes[name + "attn.attn_gate_w"] = (H, c.attn_gate)
        if c.xsa_learned and at.row >= L - c.xsa_last_n:
            shapes[name + "attn.xsa_alpha"] = (H,)
    if c.unet_skips and len(applications) > 1:
        shapes["skip_weights"] = (len(applications) // 2, d)
        if c.skip_gates:
            shapes["skip_gates"] = (len(applications) // 2, d)
    if c.parallel_start_layer:
        shapes |= {"parallel_post_lambdas": (L, 2, 2), "parallel_resid_lambdas": (L, 2)}
    if c.smear_inputs:
        shapes |= {"smear_gate.weight": (1, c.smear_inputs), "smear_lambda": (1,)}
    for name, shape in shapes.items():
        assert state[name].shape == shape, f"{name}: {state[name].shape}, expected {shape}"


def gradient(
    f: Callable[[np.ndarray], float], x: np.ndarray, eps: float = 1e-6, indices: Sequence[int] | None = None
) -> np.ndarray:
    """Central finite differences of f at x, for the given flat indices of x.

    Returns one derivative per index, or an array of x's shape if indices is None. f gets changed copies of x.
    """
    x = np.asarray(x, dtype=np.float64)
    wanted = range(x.size) if indices is None else indices
    derivatives = []
    for index in wanted:
        above, below = x.copy(), x.copy()
        above.flat[index] += eps
        below.flat[index] -= eps
        derivatives.append((float(f(above)) - float(f(below))) / (2.0 * eps))
    result = np.array(derivatives)
    return result.reshape(x.shape) if indices is None else result


# ----------------------------------------------------------------------------------------------------------
# Optimizer, one matrix or vector at a time
# ----------------------------------------------------------------------------------------------------------


def muon_update(
    g: np.ndarray,
    momentum_buffer: np.ndarray,
    mu: float,
    row_norm: bool,
    coefficients: Sequence[tuple[float, float, float]],
) -> tuple[np.ndarray, np.ndarray]:
    """Orthogonalized update and new momentum buffer of one matrix (rows, columns).

    The caller applies the learning rate, the factor sqrt(max(1, rows / columns)), and weight decay.
    """
    buffer = mu * momentum_buffer + g
    u = g + mu * buffer
    if row_norm:
        u = np.stack([row / max(np.linalg.norm(row), 1e-7) for row in u])
    tall = u.shape[0] > u.shape[1]
    X = u.T if tall else u
    X = X / (np.linalg.norm(X) + 1e-7)
    for a, b, c in coefficients:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return (X.T if tall else X), buffer


def normuon(g: np.ndarray, s: np.ndarray, beta2: float) -> tuple[np.ndarray, np.ndarray]:
    """NorMuon's rescaling of an orthogonalized update g (rows, columns); returns the new g and s.

    s is the running mean square per row if rows >= columns, else per column; any shape of that size.
    """
    axis = 1 if g.shape[0] >= g.shape[1] else 0
    v = np.mean(g**2, axis=axis, keepdims=True)
    new_s = s.reshape(v.shape) + (1.0 - beta2) * (v - s.reshape(v.shape))
    scaled = g / np.sqrt(np.maximum(new_s, 1e-10))
    scaled = scaled * np.linalg.norm(g) / max(np.linalg.norm(scaled), 1e-10)
    return scaled, new_s.reshape(s.shape)


def cautious_decay(p: np.ndarray, g: np.ndarray, lr: float, wd: float) -> np.ndarray:
    """Parameter after the update g and weight decay of the entries that decay and update both shrink."""
    mask = (g * p >= 0).astype(p.dtype)
    return p - lr * g - lr * wd * mask * p


def ema_nesterov(
    theta0: np.ndarray,
    inner_steps: Sequence[Callable[[np.ndarray], np.ndarray]],
    beta_at: Callable[[int], float],
    gamma: float,
) -> list[np.ndarray]:
    """Parameters after each step of the EMA-Nesterov wrapper.

    An inner step maps the moved parameters to those after the inner optimizer's step. beta_at gets the step,
    counted from 0, and returns 0 where the wrapper is off. The move is kept. gamma is the decay of the mean
    movement m (0.99 in the source).
    """
    theta = np.array(theta0, dtype=np.float64)
    previous = theta.copy()
    m = np.zeros_like(theta)
    trajectory = []
    for step, inner_step in enumerate(inner_steps):
        theta = theta + beta_at(step) * m
        theta = np.array(inner_step(theta.copy()), dtype=np.float64)
        m = gamma * m + (1.0 - gamma) * (theta - previous)
        previous = theta.copy()
        trajectory.append(theta.copy())
    return trajectory


# ----------------------------------------------------------------------------------------------------------
# Prefix tokens
# ----------------------------------------------------------------------------------------------------------


def prefix_table(pieces: Sequence[bytes]) -> list[int]:
    """For every token, the id of the token with the longest proper prefix of its byte string; -1 for none.

    A token without bytes has no prefix and is none. Of equal byte strings the lowest id counts.
    """
    table = []
    for piece in pieces:
        best = -1
        for other, prefix in enumerate(pieces):
            if 0 < len(prefix) < len(piece) and piece[: len(prefix)] == prefix:
                if best < 0 or len(prefix) > len(pieces[best]):
                    best = other
        table.append(best)
    return table
