from pctt.profile.measuring import measure
from pctt.profile.result import Part, Profile, Section, Span

__all__ = ["Part", "Profile", "Section", "Span", "measure"]
