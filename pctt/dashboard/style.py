"""Colours, style sheet and script of the page; the page reads as well without the script."""

from __future__ import annotations

from collections.abc import Iterable

from pctt.plots import COLOURS

ON_DARK = {"#000000": "#f2f2f2", "#0072B2": "#3f9fdc"}  # colours of plots.py that dark paper swallows
# Stops of viridis, for more curves than colours: safe for colour-blind readers, and ordered as depth is.
RAMP = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")


def colour(index: int, count: int) -> str:
    """The class of curve `index` of `count`."""
    return f"k{index}" if count <= len(COLOURS) else f"k{index}of{count}"


def sheet(counts: Iterable[int]) -> str:
    """The style sheet for pages with so many curves in a chart."""
    light, dark = list[str](), list[str]()
    for index, ink in enumerate(COLOURS):
        light.append(f".k{index}{{--ink:{ink}}}")
        dark.append(f".k{index}{{--ink:{ON_DARK.get(ink, ink)}}}")
    for count in sorted({count for count in counts if count > len(COLOURS)}):
        for index in range(count):
            along = index / (count - 1)
            name = colour(index, count)
            light.append(f".{name}{{--ink:{_ramp(0.88 * along)}}}")
            dark.append(f".{name}{{--ink:{_ramp(0.25 + 0.75 * along)}}}")
    night = f"{DARK}{''.join(dark)}"
    return f"{CSS}{''.join(light)}\n@media screen and (prefers-color-scheme:dark){{{night}}}\n"


def _ramp(at: float) -> str:
    place = at * (len(RAMP) - 1)
    first = min(int(place), len(RAMP) - 2)
    ends = [[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in RAMP[first : first + 2]]
    return "#" + "".join(f"{round(a + (place - first) * (b - a)):02x}" for a, b in zip(*ends, strict=True))


CSS = """
:root{--paper:#fff;--text:#1b1f24;--soft:#57606a;--line:#d8dee4;--panel:#f6f8fa;--alarm:#fff4d6;--edge:#b5790a}
*{box-sizing:border-box}
html{color-scheme:light dark}
body{margin:0 auto;padding:1.5rem;max-width:78rem;background:var(--paper);color:var(--text);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:.2rem 0}
h2{margin:2.5rem 0 .5rem;border-bottom:1px solid var(--line)}
h3{margin:1.8rem 0 .3rem}
h1,h2,dd,li{overflow-wrap:anywhere}td,th{overflow-wrap:break-word;max-width:30rem}
a{color:inherit}:focus-visible{outline:3px solid #3f9fdc;outline-offset:2px}
.soft,figcaption small,footer{color:var(--soft)}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,11rem),1fr));
gap:.6rem;margin:1rem 0}
.facts div{background:var(--panel);border-radius:.4rem;padding:.5rem .7rem}
.facts dt{color:var(--soft);font-size:.8rem}.facts dd{margin:0}
.warnings{background:var(--alarm);
border-left:4px solid var(--edge);margin:1rem 0;padding:.6rem 1rem .6rem 2rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.2rem}
.multiples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr));gap:.8rem}
figure{margin:0;break-inside:avoid}figcaption{font-weight:600;line-height:1.35}
figcaption small{display:block;font-weight:400}
svg{display:block;width:100%;height:auto;max-width:48rem}
svg text{fill:var(--text);font:13px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
svg .end{text-anchor:end}svg .mid{text-anchor:middle}svg .name{fill:var(--soft)}
svg path,svg .ring{fill:none;stroke:var(--ink);stroke-linecap:round;stroke-linejoin:round}
svg .grid{stroke:var(--line)}.line{stroke-width:1.8}.faint{stroke-width:1;opacity:.3}
svg .dots{stroke-width:6}svg .ring{stroke-width:2.5}
.key{display:flex;
flex-wrap:wrap;gap:.1rem 1rem;list-style:none;margin:.2rem 0 .6rem;padding:0;font-size:.9rem}
.key i{display:inline-block;
width:1.2em;height:.3em;margin-right:.4em;vertical-align:middle;background:var(--ink)}
.scroll{overflow:auto;max-height:32rem;margin:.6rem 0}table{border-collapse:collapse;font-size:.9rem}
caption{text-align:left;font-weight:600}
th,td{padding:.15rem .7rem .15rem 0;text-align:left;vertical-align:top}
tbody tr{border-top:1px solid var(--line)}tbody th{font-weight:400}td{font-variant-numeric:tabular-nums}
thead th{position:sticky;top:0;background:var(--paper)}
.core{stroke:var(--line);fill:var(--panel)}.core.used{fill:var(--ink,var(--line))}
svg text.on{fill:#fff;paint-order:stroke;stroke:#000;stroke-width:1.8px;stroke-linejoin:round}
meter{width:9rem}.slide{display:flex;gap:.8rem;align-items:center;margin:.4rem 0}.slide input{flex:0 1 24rem}
.multiples.one{display:block;max-width:46rem}
@media print{body{max-width:none;padding:0;font-size:11pt}.scroll{max-height:none;overflow:visible}
.slide,nav{display:none}.multiples [hidden]{display:block!important}
.multiples.one{display:grid;max-width:none}h2,h3{break-after:avoid}}
"""

DARK = """
:root{--paper:#14171b;--text:#e6e9ed;--soft:#9aa4af;--line:#333a42;--panel:#1e2329;--alarm:#3a2f10;--edge:#e0a020}
"""

SCRIPT = """
for (const box of document.querySelectorAll(".multiples")) {
  const panels = [...box.children], make = (tag) => document.createElement(tag);
  if (panels.length < 2) continue;
  const row = make("label"), shown = make("output"), slider = make("input");
  Object.assign(slider, {type: "range", min: 0, max: panels.length, value: 0});
  slider.oninput = () => {
    const at = Number(slider.value);
    panels.forEach((panel, i) => { panel.hidden = at > 0 && i !== at - 1; });
    box.classList.toggle("one", at > 0);
    shown.value = at ? panels[at - 1].dataset.name : "all";
    slider.setAttribute("aria-valuetext", shown.value);
  };
  row.className = "slide";
  row.append("Show", slider, shown);
  box.before(row);
  slider.oninput();
}
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
"""
