r"""Triton kernels of the scan: forward walk, backward walk, and the gradients of B, C, dt, A and D.

A row is cut into chunks of `Q` tokens. `q` is a target token of a chunk, `s` a source token, `u` the log2 of
the decay from the chunk's start through a token, inclusive. With the state `h` that enters a chunk,

$$M_{qs} = (C_q \cdot B_s)\, 2^{u_q - u_s} dt_s\ (s \le q), \qquad
  y = M x + 2^{u} C h + D x, \qquad h \leftarrow 2^{u_{last}} h + B^\top (2^{u_{last} - u} dt\, x)$$

and with `g`, the gradient of the state that leaves the chunk,

$$dx = M^\top dy + 2^{u_{last} - u} dt\, B g + D\, dy, \qquad
  g \leftarrow 2^{u_{last}} g + C^\top (2^{u} dy)$$

Matmuls take operands in the dtype of x and accumulate in float32; decays, states and their gradients are
float32. Token pairs and states that would cross a document boundary are masked out.
No atomics: every element is written once, by one program, so the results are deterministic.

Source: Dao & Gu 2024, arXiv:2405.21060, section 6.
"""

# The bodies are Triton code, and triton is installed only where these kernels run.
# pyright: reportMissingImports=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def _steps(dt_ptr, A_ptr, row, start, head, length, H: tl.constexpr, Q: tl.constexpr):
    """Load dt of a chunk, 0 past the end, and sum the log2 of its decays, each clamped at -160 (exp2 is 0).

    Returns dt; the sums through each token in two terms, `coarse` and `fine`; the sums after each token to
    the chunk's end; and the chunk's sum. Cumulative sums of multiples of 1/256 and their differences are
    exact, and the remainders stay small: no cancellation, even beside steps that wipe the state.
    """
    q = tl.arange(0, Q)
    dt = tl.load(dt_ptr + (row * length + start) * H + head + q * H, mask=q < length - start, other=0.0)
    steps = tl.maximum(dt * (tl.load(A_ptr + head) * 1.4426950408889634), -160.0)
    coarse = tl.floor(steps * 256.0) * 0.00390625
    fine, coarse = tl.cumsum(steps - coarse, 0), tl.cumsum(coarse, 0)
    last_coarse = tl.sum(tl.where(q == Q - 1, coarse, 0.0), 0)
    last_fine = tl.sum(tl.where(q == Q - 1, fine, 0.0), 0)
    to_end = (last_coarse - coarse) + (last_fine - fine)
    return dt, coarse, fine, tl.minimum(to_end, 0.0), last_coarse + last_fine


@triton.jit
def _decay_of_pairs(pairs, coarse, fine, SOURCE: tl.constexpr, PRECISION: tl.constexpr):
    """Return the decay from token `s` to token `q` where `pairs`, else 0; axis `SOURCE` is that of `s`."""
    if PRECISION == "tf32x3":
        log = _difference(coarse, SOURCE) + _difference(fine, SOURCE)
    else:  # the cancellation error is below 16-bit precision
        log = _difference(coarse + fine, SOURCE)
    # mask before exp2: outside `pairs` the difference is positive and exp2 overflows
    return tl.exp2(tl.where(pairs, tl.minimum(log, 0.0), float("-inf")))


@triton.jit
def _difference(sums, SOURCE: tl.constexpr):
    if SOURCE == 0:
        return sums[None, :] - sums[:, None]
    return sums[:, None] - sums[None, :]


@triton.jit
def _documents(doc_ptr, row, start, length, Q: tl.constexpr):
    """Load document numbers of a chunk's tokens `(Q,)`, its last token, and the token before it (or 1)."""
    q = tl.arange(0, Q)
    row_ptr = doc_ptr + row * length
    documents = tl.load(row_ptr + tl.minimum(start + q, length - 1))
    last = tl.load(row_ptr + tl.minimum(start + Q, length) - 1)
    before = tl.load(row_ptr + tl.maximum(start, 1) - 1)
    return documents, last, tl.where(start == 0, 1, before)


@triton.jit
def _tile(ptr, row, start, length, column, STRIDE: tl.constexpr, Q: tl.constexpr, WIDTH: tl.constexpr):
    """Return pointers `(Q, WIDTH)` to a chunk of an array `(b, l, STRIDE)` from `column` on, and a mask."""
    q = tl.arange(0, Q)
    pointers = ptr + (row * length + start) * STRIDE + column + q[:, None] * STRIDE
    return pointers + tl.arange(0, WIDTH)[None, :], (q < length - start)[:, None]


@triton.jit
def _state_tile(ptr, index, p0, n0, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """Return pointers to the tile `(BP, BN)` at `(p0, n0)` of state `index`, of shape `(P, N)`."""
    p, n = p0 + tl.arange(0, BP), n0 + tl.arange(0, BN)
    return ptr + index * (P * N) + p[:, None] * N + n[None, :]


@triton.jit
def forward_walk(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, state_ptr, doc_ptr, length, piece_chunks,
    y_ptr, final_ptr, entering_ptr,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, PIECES: tl.constexpr,
    SEGMENTS: tl.constexpr, WRITE_Y: tl.constexpr, WRITE_ENTERING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Loop over the `piece_chunks` chunks of one piece, for `BP` channels of one head, carrying the state.

    Grid: `(b, H * P // BP, PIECES)`. Reads `state (b, PIECES, H, P, N)`, which enters each piece; writes
    `final (b, PIECES, H, P, N)`, with WRITE_Y `y (b, l, H, P)`, and with WRITE_ENTERING
    `entering (b, chunks, H, P, N)`, the state that enters each chunk.
    """
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head, p0 = tl.program_id(1) // (P // BP), tl.program_id(1) % (P // BP) * BP
    group = head // (H // G)
    q = tl.arange(0, Q)
    causal = q[:, None] >= q[None, :]
    D = tl.load(D_ptr + head * P + p0 + tl.arange(0, BP))
    state_index = (row * PIECES + piece) * H + head
    h = tl.load(_state_tile(state_ptr, state_index, p0, 0, P, N, BP, N))  # (BP, N) float32
    num_chunks = tl.cdiv(length, Q)
    first = piece * piece_chunks
    for chunk in range(first, tl.minimum(first + piece_chunks, num_chunks)):
        start = chunk * Q
        x_tile, valid = _tile(x_ptr, row, start, length, head * P + p0, H * P, Q, BP)
        x = tl.load(x_tile, mask=valid, other=0.0)
        B_tile, _ = _tile(B_ptr, row, start, length, group * N, G * N, Q, N)
        B = tl.load(B_tile, mask=valid, other=0.0)
        dt, coarse, fine, log_to_end, last = _steps(dt_ptr, A_ptr, row, start, head, length, H, Q)
        to_end, kept = tl.exp2(log_to_end) * dt, tl.exp2(last)
        pairs = causal
        if SEGMENTS:
            documents, doc_last, doc_before = _documents(doc_ptr, row, start, length, Q)
            pairs = causal & (documents[:, None] == documents[None, :])
            to_end = tl.where(documents == doc_last, to_end, 0.0)
            kept = tl.where(doc_last == doc_before, kept, 0.0)
        if WRITE_ENTERING:
            index = (row * num_chunks + chunk) * H + head
            tile = _state_tile(entering_ptr, index, p0, 0, P, N, BP, N)
            tl.store(tile, h.to(entering_ptr.dtype.element_ty))
        if WRITE_Y:
            C_tile, _ = _tile(C_ptr, row, start, length, group * N, G * N, Q, N)
            C = tl.load(C_tile, mask=valid, other=0.0)
            from_start = tl.exp2(coarse + fine)
            if SEGMENTS:
                from_start = tl.where(documents == doc_before, from_start, 0.0)
            scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)  # (q, s)
            decay = _decay_of_pairs(pairs, coarse, fine, 1, PRECISION)
            M = (scores * decay * dt[None, :]).to(x.dtype)
            y = tl.dot(C, tl.trans(h.to(x.dtype)), input_precision=PRECISION) * from_start[:, None]
            y += tl.dot(M, x, input_precision=PRECISION) + x.to(tl.float32) * D[None, :]
            y_tile, _ = _tile(y_ptr, row, start, length, head * P + p0, H * P, Q, BP)
            tl.store(y_tile, y.to(x.dtype), mask=valid)
        x_to_end = (x.to(tl.float32) * to_end[:, None]).to(x.dtype)
        h = h * kept + tl.dot(tl.trans(x_to_end), B, input_precision=PRECISION)
    tl.store(_state_tile(final_ptr, state_index, p0, 0, P, N, BP, N), h)


@triton.jit
def backward_walk(
    dy_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, gradient_ptr, doc_ptr, length, piece_chunks,
    dx_ptr, first_ptr, leaving_ptr,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, PIECES: tl.constexpr,
    SEGMENTS: tl.constexpr, WRITE_DX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Loop backward over the chunks of one piece: `forward_walk` in reverse, with dy for x and C for B.

    Grid: `(b, H * P // BP, PIECES)`. Reads `gradient (b, PIECES, H, P, N)`, of the state that leaves each
    piece; writes `first (b, PIECES, H, P, N)`, of the state that enters each piece, and with WRITE_DX
    `dx (b, l, H, P)` and `leaving (b, chunks, H, P, N)`, of the state that leaves each chunk.
    """
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head, p0 = tl.program_id(1) // (P // BP), tl.program_id(1) % (P // BP) * BP
    group = head // (H // G)
    t = tl.arange(0, Q)
    causal = t[:, None] <= t[None, :]  # (s, q)
    D = tl.load(D_ptr + head * P + p0 + tl.arange(0, BP))
    state_index = (row * PIECES + piece) * H + head
    g = tl.load(_state_tile(gradient_ptr, state_index, p0, 0, P, N, BP, N))  # (BP, N) float32
    num_chunks = tl.cdiv(length, Q)
    first = piece * piece_chunks
    end = tl.minimum(first + piece_chunks, num_chunks)
    for step in range(first, end):
        chunk = first + end - 1 - step
        start = chunk * Q
        dy_tile, valid = _tile(dy_ptr, row, start, length, head * P + p0, H * P, Q, BP)
        dy = tl.load(dy_tile, mask=valid, other=0.0)
        C_tile, _ = _tile(C_ptr, row, start, length, group * N, G * N, Q, N)
        C = tl.load(C_tile, mask=valid, other=0.0)
        dt, coarse, fine, log_to_end, last = _steps(dt_ptr, A_ptr, row, start, head, length, H, Q)
        from_start, kept = tl.exp2(coarse + fine), tl.exp2(last)
        pairs = causal
        if SEGMENTS:
            documents, doc_last, doc_before = _documents(doc_ptr, row, start, length, Q)
            pairs = causal & (documents[:, None] == documents[None, :])
            from_start = tl.where(documents == doc_before, from_start, 0.0)
            kept = tl.where(doc_last == doc_before, kept, 0.0)
        if WRITE_DX:
            leaving = g.to(dy.dtype)
            index = (row * num_chunks + chunk) * H + head
            tl.store(_state_tile(leaving_ptr, index, p0, 0, P, N, BP, N), leaving)
            B_tile, _ = _tile(B_ptr, row, start, length, group * N, G * N, Q, N)
            B = tl.load(B_tile, mask=valid, other=0.0)
            to_end = tl.exp2(log_to_end)
            if SEGMENTS:
                to_end = tl.where(documents == doc_last, to_end, 0.0)
            scores = tl.dot(B, tl.trans(C), input_precision=PRECISION)  # (s, q)
            decay = _decay_of_pairs(pairs, coarse, fine, 0, PRECISION)
            M = (scores * decay).to(dy.dtype)
            dx = tl.dot(B, tl.trans(leaving), input_precision=PRECISION) * to_end[:, None]
            dx += tl.dot(M, dy, input_precision=PRECISION)
            dx = dx * dt[:, None] + dy.to(tl.float32) * D[None, :]
            dx_tile, _ = _tile(dx_ptr, row, start, length, head * P + p0, H * P, Q, BP)
            tl.store(dx_tile, dx.to(dy.dtype), mask=valid)
        dy_from_start = (dy.to(tl.float32) * from_start[:, None]).to(dy.dtype)
        g = g * kept + tl.dot(tl.trans(dy_from_start), C, input_precision=PRECISION)
    tl.store(_state_tile(first_ptr, state_index, p0, 0, P, N, BP, N), g)


@triton.jit
def backward_chunks(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, dy_ptr, entering_ptr, leaving_ptr, doc_ptr, length,
    dB_ptr, dC_ptr, ddt_ptr, dA_ptr, dD_ptr,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute gradients of B, C, dt, A and D for one chunk, one group and `BN` state channels.

    Loops over the group's heads. State channels do not mix; the caller sums ddt and dA over blocks of `BN`.
    Grid: `(b, chunks, G * N // BN)`. Reads `entering`, the state that enters each chunk, and `leaving`,
    the gradient of the state that leaves each chunk, both `(b, chunks, H, P, N)`; writes
    `dB, dC (b, l, G, N)`, `ddt (N // BN, b, l, H)`, `dA (N // BN, b, chunks, H)` and `dD (b, chunks, H, P)`.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, block = tl.program_id(2) // (N // BN), tl.program_id(2) % (N // BN)
    n0, start = block * BN, chunk * Q
    num_rows, num_chunks = tl.num_programs(0), tl.num_programs(1)
    t = tl.arange(0, Q)
    pairs = t[:, None] <= t[None, :]  # (s, q)
    B_tile, valid = _tile(B_ptr, row, start, length, group * N + n0, G * N, Q, BN)
    C_tile, _ = _tile(C_ptr, row, start, length, group * N + n0, G * N, Q, BN)
    B = tl.load(B_tile, mask=valid, other=0.0)
    C = tl.load(C_tile, mask=valid, other=0.0)
    if SEGMENTS:
        documents, doc_last, doc_before = _documents(doc_ptr, row, start, length, Q)
        pairs = pairs & (documents[:, None] == documents[None, :])
    scores = tl.dot(B, tl.trans(C), input_precision=PRECISION)  # (s, q)
    earlier = (t[None, :] < t[:, None]).to(B.dtype)
    dB, dC = tl.zeros((Q, BN), tl.float32), tl.zeros((Q, BN), tl.float32)
    dscores = tl.zeros((Q, Q), tl.float32)  # (s, q)
    for head in range(group * (H // G), (group + 1) * (H // G)):
        dt, coarse, fine, log_to_end, last = _steps(dt_ptr, A_ptr, row, start, head, length, H, Q)
        from_start, to_end, kept = tl.exp2(coarse + fine), tl.exp2(log_to_end), tl.exp2(last)
        if SEGMENTS:
            from_start = tl.where(documents == doc_before, from_start, 0.0)
            to_end = tl.where(documents == doc_last, to_end, 0.0)
            kept = tl.where(doc_last == doc_before, kept, 0.0)
        decay = _decay_of_pairs(pairs, coarse, fine, 0, PRECISION)
        # contractions over the channels p: x_s . dy_q, x . g and dy . h
        products = tl.zeros((Q, Q), tl.float32)  # (s, q)
        x_left, dy_read = tl.zeros((Q, BN), tl.float32), tl.zeros((Q, BN), tl.float32)
        overlap = 0.0
        for p0 in tl.static_range(0, P, BP):
            x_tile, _ = _tile(x_ptr, row, start, length, head * P + p0, H * P, Q, BP)
            dy_tile, _ = _tile(dy_ptr, row, start, length, head * P + p0, H * P, Q, BP)
            x = tl.load(x_tile, mask=valid, other=0.0)
            dy = tl.load(dy_tile, mask=valid, other=0.0)
            index = (row * num_chunks + chunk) * H + head
            h = tl.load(_state_tile(entering_ptr, index, p0, n0, P, N, BP, BN))  # (BP, BN)
            g = tl.load(_state_tile(leaving_ptr, index, p0, n0, P, N, BP, BN))
            products += tl.dot(x, tl.trans(dy), input_precision=PRECISION)
            x_left += tl.dot(x, g, input_precision=PRECISION)
            dy_read += tl.dot(dy, h, input_precision=PRECISION)
            overlap += tl.sum(tl.sum(h.to(tl.float32) * g.to(tl.float32), 1), 0)
            if block == 0:
                dD = tl.sum(x.to(tl.float32) * dy.to(tl.float32), 0)
                tl.store(dD_ptr + index * P + p0 + tl.arange(0, BP), dD)
        products *= decay
        dscores += products * dt[:, None]
        dB += x_left * (to_end * dt)[:, None]
        dC += dy_read * from_start[:, None]
        # ddt: first, dt as the factor of a token's input; then d(dt A), through every decay that spans the
        # step: pairs across it, reads of the entering state, writes to the leaving state, the whole chunk
        left = to_end * tl.sum(B.to(tl.float32) * x_left, 1)
        read = from_start * tl.sum(C.to(tl.float32) * dy_read, 1)
        factor = scores * products
        ddt = tl.sum(factor, 1) + left
        # Writes of tokens before t to the leaving state are added to the pairs' matrix, in the last token's
        # column. As a difference of two cumulative sums, small ones would cancel beside the token's own.
        spans = factor * dt[:, None] + tl.where(t[None, :] == Q - 1, (left * dt)[:, None], 0.0)
        across = tl.dot(earlier, spans.to(B.dtype), input_precision=PRECISION)
        dlog = tl.sum(tl.where(t[None, :] >= t[:, None], across, 0.0), 1)
        dlog += tl.cumsum(read, 0, reverse=True)
        dlog += kept * overlap
        ddt += dlog * tl.load(A_ptr + head)
        base = ddt_ptr + ((block * num_rows + row) * length + start) * H + head
        tl.store(base + t * H, ddt, mask=t < length - start)
        dA = tl.sum(dlog * dt, 0)
        tl.store(dA_ptr + ((block * num_rows + row) * num_chunks + chunk) * H + head, dA)
    dscores = dscores.to(B.dtype)
    dB += tl.dot(dscores, C, input_precision=PRECISION)
    dC += tl.dot(tl.trans(dscores), B, input_precision=PRECISION)
    dB_tile, _ = _tile(dB_ptr, row, start, length, group * N + n0, G * N, Q, BN)
    dC_tile, _ = _tile(dC_ptr, row, start, length, group * N + n0, G * N, Q, BN)
    tl.store(dB_tile, dB.to(B.dtype), mask=valid)
    tl.store(dC_tile, dC.to(B.dtype), mask=valid)
