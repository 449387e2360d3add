"""How a problem is cut: the rules, on plain numbers. Any version of jax."""

import types

import jax
import jax.numpy as jnp
import pytest
from mamba2_jax.pallas.mosaic_gpu import plan
from mamba2_jax.pallas.mosaic_gpu.plan import SKIP_COST, choose_pieces, cut, make_plan, unsupported


@pytest.mark.parametrize(
    ("name", "shape", "pieces"),
    [
        ("Codestral, one row", {"batch": 1, "length": 4096, "heads": 128, "groups": 8}, 2),
        ("2.7b, eight rows", {"batch": 8, "length": 2048, "heads": 80, "groups": 1}, 1),
        ("2.7b, one long row", {"batch": 1, "length": 131072, "heads": 80, "groups": 1}, 3),
        ("130m, one long row", {"batch": 1, "length": 65536, "heads": 24, "groups": 1}, 5),
        ("130m, eight rows", {"batch": 8, "length": 2048, "heads": 24, "groups": 1}, 1),
        ("130m, a short row", {"batch": 1, "length": 200, "heads": 24, "groups": 1}, 2),
        ("one chunk", {"batch": 1, "length": 64, "heads": 2, "groups": 1}, 1),
    ],
)
def test_a_sequence_is_cut_while_every_block_has_an_sm_of_its_own(name, shape, pieces):
    made = make_plan(**shape, head_dim=64, state_dim=128)
    assert len(made.piece_ends) == pieces, name
    blocks = shape["batch"] * shape["groups"] * made.blocks_per_group
    assert pieces == 1 or blocks * pieces <= plan.MULTIPROCESSORS
    assert made.stages <= made.piece_ends[0]


@pytest.mark.parametrize("chunks", [*range(2, 40), 333, 1024])
def test_pieces_cover_the_sequence_and_cost_the_same(chunks):
    for pieces in range(1, chunks // 2 + 1):
        if pieces > plan.MOST_PIECES:
            break
        ends = cut(chunks, pieces)
        assert len(ends) == pieces
        assert ends[-1] == chunks
        assert all(left < right for left, right in zip((0, *ends), ends, strict=False))
        if chunks > 300:
            costs = [
                SKIP_COST * start + end - start for start, end in zip((0, *ends[:-1]), ends, strict=True)
            ]
            assert max(costs) / min(costs) < 1.05
            assert pieces == 1 or max(costs) < chunks / (1 + SKIP_COST)  # and the cut pays


def test_no_more_blocks_than_pay():
    assert choose_pieces(blocks=66, chunks=1000) == 2
    assert choose_pieces(blocks=67, chunks=1000) == 1
    assert choose_pieces(blocks=1, chunks=1000) == plan.MOST_PIECES
    assert choose_pieces(blocks=1, chunks=5) == 2


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("state_dim", "stages"), [(64, 4), (128, 3), (256, 2)])
def test_as_many_stages_as_fit(state_dim, stages, documents):
    assert min(plan.fitting_stages(state_dim, 2, documents), plan.MOST_STAGES) == stages
    assert plan.smem_bytes(state_dim, stages, 2, documents) < plan.SMEM_LIMIT


@pytest.mark.parametrize(
    ("heads", "groups", "head_dim", "blocks"),
    [(4, 2, 64, 1), (3, 1, 64, 2), (1, 1, 64, 1), (3, 3, 128, 1), (5, 1, 128, 5)],
)
def test_strips_pair_up_within_a_group(heads, groups, head_dim, blocks):
    made = make_plan(1, 640, heads, groups, head_dim, 64, pieces=1)
    assert made.blocks_per_group == blocks


def problem(**changes):
    hopper = {"platform": "gpu", "compute_capability": (9, 0), "dtype": "bfloat16"}
    shape = {"num_heads": 24, "head_dim": 64, "num_groups": 1, "state_dim": 128, "batch": 1, "length": 100}
    return types.SimpleNamespace(**{**hopper, **shape, "D_per_channel": False, **changes})


def test_what_it_cannot_run_it_says():
    assert unsupported(problem()) is None
    assert unsupported(problem(dtype="float16", head_dim=128, state_dim=256)) is None
    assert unsupported(problem(dtype=jnp.bfloat16, num_heads=3, length=1)) is None
    assert unsupported(problem(head_dim=80)) is unsupported(problem(head_dim=32)) is None
    for change, words in [
        ({"compute_capability": (8, 0)}, "compute capability 9.0), and this device has 8.0"),
        ({"compute_capability": None}, "has an unknown one"),
        ({"dtype": "float32"}, "bfloat16 or float16, and x is float32"),
        ({"head_dim": 16}, "head_dim from 32 to 128, not 16"),
        ({"head_dim": 192}, "head_dim from 32 to 128, not 192"),
        ({"state_dim": 16}, "state_dim of 64, 128 or 256, not 16"),
    ]:
        assert words in unsupported(problem(**change))


def test_an_old_jax_is_named():
    if jax.__version_info__ >= (0, 11, 2):
        pytest.skip("this jax is new enough for the kernels")
    with pytest.raises(ImportError, match=r"need jax >= 0\.11\.2"):
        import mamba2_jax.pallas.mosaic_gpu.bridge  # noqa: F401
