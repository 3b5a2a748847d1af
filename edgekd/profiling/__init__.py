"""Measuring artifacts: `profile_artifact` one alone, `profile_many` several against each other, in fresh processes of the device."""
from edgekd.profiling.profile import ComponentProfile, Profile, profile_artifact, profile_many

__all__ = ["ComponentProfile", "Profile", "profile_artifact", "profile_many"]
