"""Reading XLA's text: tiles, collectives, source lines."""

import jax
import jax.numpy as jnp
import pytest

from pop3d_jax.hlo_text import array_bytes, collectives, largest_arrays

TPU_TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/site-packages/flax/linear.py"
2 "/home/me/pop3d_jax/models/fpn.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=2 function_name_id=1 line=70 end_line=70 column=6 end_column=6}
2 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=6 end_column=6}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%fused_computation.1 (param_0: f32[8,128]) -> f32[64,128] {
  %param_0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %inner = f32[64,128]{1,0:T(8,128)} broadcast(%param_0)
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %fusion.1 = f32[64,128]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%fused_computation.1, metadata={op_name="jit(step)/x" stack_frame_id=2}
  %on_chip = f32[999,128]{1,0:T(8,128)S(1)} copy(%a)
  %all-reduce.1 = (f32[3,5]{1,0:T(8,128)}, bf16[16]{0:T(128)}) all-reduce(%fusion.1, %a), replica_groups={}
  %gather = (f32[8]{0:T(128)}, f32[32]{0:T(128)}) all-gather-start(%a), dimensions={0}
  ROOT %done = f32[32]{0:T(128)} all-gather-done(%gather)
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("element", "shape", "layout", "tiles", "expected"),
    [
        ("f32", "3,5", None, None, 60),
        ("f32", "3,5", "1,0", "T(8,128)", 8 * 128 * 4),
        ("f32", "3,5", "0,1", "T(8,128)", 128 * 8 * 4),
        ("f32", "200,3", "0,1", "T(8,128)", 256 * 8 * 4),
        ("bf16", "6,10,32", "2,1,0", "T(8,128)(2,1)", 6 * 16 * 128 * 2),
        ("pred", "7", None, None, 7),
        ("f32", "", None, None, 4),
    ],
)
def test_bytes_are_those_of_whole_tiles(element, shape, layout, tiles, expected):
    assert array_bytes(element, shape, layout, tiles) == expected


def test_collectives_and_large_arrays_of_a_tpu_program():
    # Tuples are added up; of an asynchronous start only the result counts.
    assert collectives(TPU_TEXT) == {"all-gather": (1, 512), "all-reduce": (1, 4096 + 256)}
    first, *_ = arrays = largest_arrays(TPU_TEXT, 10)
    assert (first.bytes, first.shape, first.operation) == (64 * 128 * 4, "f32[64,128]", "jit(step)/x")
    assert first.source == "pop3d_jax/models/fpn.py:70"
    assert not any("999" in array.shape for array in arrays)


def test_a_real_program_names_a_line():
    compiled = jax.jit(lambda x: jnp.sort(x @ x.T, axis=0)).lower(jnp.ones((64, 64))).compile()
    assert any(array.source for array in largest_arrays(compiled.as_text(), 5))
    assert collectives(compiled.as_text()) == {}
