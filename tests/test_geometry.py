import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax import geometry

unit = st.floats(-1.0, 1.0)
quaternions = st.tuples(unit, unit, unit, unit).filter(lambda q: np.linalg.norm(q) > 0.1).map(np.array)
translations = st.tuples(*[st.floats(-1000.0, 1000.0)] * 3).map(np.array)


@given(quaternions)
@settings(deadline=None, max_examples=50)
def test_a_rotation_matrix_is_orthonormal_and_gives_its_quaternion_back(quaternion):
    rotation = geometry.quaternion_to_rotation(quaternion)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-14)
    assert np.isclose(np.linalg.det(rotation), 1.0)
    again = geometry.quaternion_to_rotation(geometry.rotation_to_quaternion(rotation))
    np.testing.assert_allclose(again, rotation, atol=1e-12)


def test_a_quarter_turn_about_z_takes_x_to_y():
    rotation = geometry.quaternion_to_rotation(np.array([np.sqrt(0.5), 0.0, 0.0, np.sqrt(0.5)]))
    np.testing.assert_allclose(rotation @ [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], atol=1e-15)


@pytest.mark.parametrize("quaternion", [np.zeros(4), np.array([np.nan, 0.0, 0.0, 1.0])])
def test_a_quaternion_without_direction_is_refused(quaternion):
    with pytest.raises(ValueError, match="not a rotation"):
        geometry.quaternion_to_rotation(quaternion)


@given(quaternions, translations)
@settings(deadline=None, max_examples=50)
def test_the_inverse_of_a_rigid_transform_undoes_it(quaternion, translation):
    transform = geometry.rigid_transform(quaternion, translation)
    np.testing.assert_allclose(geometry.invert_rigid(transform) @ transform, np.eye(4), atol=1e-9)


@given(quaternions, translations)
@settings(deadline=None, max_examples=50)
def test_points_go_to_another_frame_as_homogeneous_columns_do(quaternion, translation):
    transform = geometry.rigid_transform(quaternion, translation)
    points = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    columns = np.concatenate([points.T, np.ones((1, 5))])
    moved = geometry.apply_rigid(transform, points)
    assert moved.dtype == np.float64
    np.testing.assert_allclose(moved, (transform @ columns)[:3].T, rtol=0, atol=1e-9)


def test_projection_of_a_point_ahead_of_a_camera_at_the_origin():
    # A camera that looks along the lidar's y (forward), its x to the right, its y down.
    lidar_to_camera = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    intrinsics = np.array([[100.0, 0, 50], [0, 100, 30], [0, 0, 1]])
    matrix = geometry.lidar_to_image(intrinsics, lidar_to_camera)
    uv, depth = geometry.project(np.array([[1.0, 10.0, -2.0], [0.0, -5.0, 0.0]]), matrix)
    np.testing.assert_allclose(uv[0], [60.0, 50.0])
    np.testing.assert_allclose(depth, [10.0, -5.0])
    assert geometry.visible(uv, depth, (60, 100)).tolist() == [True, False]


def test_visibility_is_strict_at_every_border():
    uv = np.array([[0.0, 5.0], [1e-9, 5.0], [9.0, 5.0], [8.999, 5.0], [5.0, 0.0], [5.0, 7.0], [5.0, 6.999], [5.0, 5.0]])
    depth = np.array([2.0, 2, 2, 2, 2, 2, 2, 1.0])
    seen = geometry.visible(uv, depth, (8, 10))
    assert seen.tolist() == [False, True, False, True, False, False, True, False]
