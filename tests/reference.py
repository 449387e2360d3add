"""Reimplement the scan and the convolution token by token in float64 numpy, as a reference."""

import numpy as np


def ssd(x, dt, A, B, C, D=None, initial_state=None, segment_ids=None):
    x, dt, A, B, C = (np.asarray(a, np.float64) for a in (x, dt, A, B, C))
    b, l, h, p = x.shape
    per_group = h // B.shape[2]
    state = np.zeros((b, h, p, B.shape[3])) if initial_state is None else np.array(initial_state, np.float64)
    y = np.zeros_like(x)
    for i in range(b):
        seen, previous = False, 0
        for t in range(l):
            if segment_ids is not None:
                current = int(segment_ids[i, t])
                if current == 0:
                    previous = 0
                    continue
                if current != previous and seen:
                    state[i] = 0
                seen, previous = True, current
            for j in range(h):
                group = j // per_group
                state[i, j] *= np.exp(dt[i, t, j] * A[j])
                state[i, j] += dt[i, t, j] * np.outer(x[i, t, j], B[i, t, group])
                y[i, t, j] = state[i, j] @ C[i, t, group]
                if D is not None:
                    y[i, t, j] += np.asarray(D, np.float64)[j] * x[i, t, j]
    return y, state


def causal_conv1d(x, weight, bias=None, initial_state=None, segment_ids=None, silu=True):
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    b, l = x.shape[:2]
    reach = weight.shape[0] - 1
    y, final = np.zeros_like(x), np.zeros((b, reach, *x.shape[2:]))
    for i in range(b):
        window = (
            [np.zeros(x.shape[2:])] * reach
            if initial_state is None
            else list(np.asarray(initial_state[i], np.float64))
        )
        seen, previous = False, 0
        for t in range(l):
            if segment_ids is not None:
                current = int(segment_ids[i, t])
                if current == 0:
                    previous = 0
                    continue
                if current != previous and seen:
                    window = [np.zeros(x.shape[2:])] * reach
                seen, previous = True, current
            window.append(x[i, t])
            out = sum(w * v for w, v in zip(weight, window, strict=True))
            out = out if bias is None else out + np.asarray(bias, np.float64)
            y[i, t] = out / (1 + np.exp(-out)) if silu else out
            window = window[1:]
        final[i] = np.stack(window)
    return y, final
