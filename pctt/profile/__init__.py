"""Where the time of a training step goes: `measure` an engine, read the `Profile`."""

from pctt.profile.measuring import measure
from pctt.profile.result import Part, Profile, Section, Span

__all__ = ["Part", "Profile", "Section", "Span", "measure"]
