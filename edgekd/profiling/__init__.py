"""Measuring artifacts: `profile_artifact` one alone, `profile_many` several against each other, in fresh processes of the device.
`edgekd.profiling.everything` measures the whole way from a photo to all its masks."""
from edgekd.profiling.bare import ModelFile, model_file
from edgekd.profiling.profile import ComponentProfile, Profile, profile_artifact, profile_many

__all__ = ["ComponentProfile", "ModelFile", "Profile", "model_file", "profile_artifact", "profile_many"]
