"""KVFormat: names, sizes, planes, errors, and the tables of the documentation."""

from pathlib import Path

import pytest

from tq_inductor import KVFormat
from tq_inductor.errors import FormatError
from tq_inductor.format import PACKED_BITS, VLLM_ALIASES, format_names, format_table, round_up


@pytest.mark.parametrize(
    ("name", "head_dim", "slot_bytes"),
    [
        ("k4v4", 128, 132),
        ("k4v4", 64, 68),
        ("k4v4", 80, 84),
        ("k8v4", 128, 196),
        ("k3v3", 128, 100),
        ("k2v2", 128, 68),
        ("k3v2", 96, 64),
        ("bf16", 128, 512),
        ("fp16", 80, 320),
    ],
)
def test_slot_bytes(name, head_dim, slot_bytes):
    fmt = KVFormat(name, head_dim=head_dim)
    assert fmt.slot_bytes == slot_bytes
    assert fmt.bits_per_value == pytest.approx(8 * slot_bytes / (2 * head_dim))
    assert fmt.compression == pytest.approx(4 * head_dim / slot_bytes)
    assert f"{slot_bytes} bytes" in fmt.describe()


def test_defaults_and_hash():
    assert KVFormat("k4v4") == KVFormat("k4v4", head_dim=128, v_head_dim=128)
    assert len({KVFormat("k4v4"), KVFormat("k4v4", 128), KVFormat("k4v3")}) == 2


def test_every_pair_of_bits_is_a_format():
    assert len(format_names()) == len(PACKED_BITS) ** 2 + 2
    for name in format_names():
        for head_dim in (8, 64, 80, 96, 112, 192, 576):
            fmt = KVFormat(name, head_dim)
            planes = fmt.planes(48)
            ends = [plane.offset + plane.nbytes for plane in planes]
            assert [plane.offset for plane in planes] == [0, *ends[:-1]]  # no gap, no overlap
            assert ends[-1] == 48 * fmt.slot_bytes
            assert fmt.page_size(ends[-1]) == 48
            assert all(plane.offset % 16 == 0 for plane in planes)


@pytest.mark.parametrize(("alias", "name"), VLLM_ALIASES.items())
def test_vllm_preset_names(alias, name):
    assert KVFormat(alias).name == name
    assert KVFormat(alias) == KVFormat(name)


def test_values_may_have_another_head_dim():
    fmt = KVFormat("k4v3", 192, 128)
    assert (fmt.k_row_bytes, fmt.v_row_bytes) == (96, 48)
    assert fmt.slot_bytes == 96 + 48 + 4


@pytest.mark.parametrize("name", ["k5v4", "k4v1", "k4", "int4", "", "K4V4 ", "bf61", ["k4v4"]])
def test_unknown_names_say_what_is_allowed(name):
    with pytest.raises(FormatError, match=r"unknown kv_format .*Allowed: k\{bits\}v\{bits\}"):
        KVFormat(name)


def test_a_near_miss_is_named():
    with pytest.raises(FormatError, match=r"Nearest: .*k4v4"):
        KVFormat("k4-v4")


@pytest.mark.parametrize("head_dim", [0, 4, 100, 1032])
def test_head_dims_that_cannot_be_packed(head_dim):
    with pytest.raises(FormatError, match=f"head_dim={head_dim}"):
        KVFormat("k4v4", head_dim)


def test_page_size_must_be_whole_groups():
    with pytest.raises(FormatError, match="page_size=20 is not a multiple of 16"):
        KVFormat("k4v4").planes(20)
    assert [round_up(n) for n in (1, 16, 17)] == [16, 16, 32]


def test_the_documented_table_is_the_formats():
    document = Path(__file__).parent.parent / "docs" / "cache_format.md"
    assert format_table() in document.read_text(), "print it with tq_inductor.format.format_table()"
