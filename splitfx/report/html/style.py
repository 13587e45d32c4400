"""Style of the page, which stands inside it: light and dark, wide and narrow, on paper."""

COLOURS = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1d2530;--soft:#66717f;--line:#dfe3e8;
--blue:#2f6fb3;
--bluebg:#e6f0fa;--orange:#b85c1e;--orangebg:#fdeee2;--grey:#f1f3f5;--green:#2f7d56;--greenbg:#e6f4ec;--violet:#7552b5;--violetbg:#f0eafa}
@media(prefers-color-scheme:dark){:root{--bg:#14181d;--card:#1b2027;--ink:#e4e8ed;--soft:#98a3b0;
--line:#323a44;
--blue:#7db4ec;--bluebg:#1c3048;--orange:#f0a263;--orangebg:#3d2817;--grey:#242b33;--green:#79c79d;
--greenbg:#1a3527;--violet:#b79cf0;--violetbg:#2c2244}}
"""

GRAPH = """
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:var(--soft);
text-anchor:middle}
svg text.name{fill:var(--ink);font-weight:600}svg text.left,svg text.start{text-anchor:start}
svg text.end{text-anchor:end}
.edge{fill:none;stroke:var(--soft);stroke-width:1.2;opacity:.75}.skip{stroke-dasharray:4 3}
.box>rect{fill:var(--grey);stroke:var(--soft);stroke-width:1}
.box.branch>rect,.box.grouped>rect{fill:var(--bluebg);stroke:var(--blue)}
.box.fusion>rect{fill:var(--orangebg);stroke:var(--orange)}
.box.input>rect,.box.entry>rect{fill:var(--greenbg);stroke:var(--green)}
.box.tiled>rect{fill:var(--violetbg);stroke:var(--violet)}.box.join>rect{fill:var(--card)}
.box.open>rect{fill-opacity:.45;stroke-opacity:.7}.box.open.module:not(.branch)>rect,.box.open.repeat>rect{
fill:var(--bg)}
.box.new>.face{stroke:var(--orange);stroke-width:2}
.cell{stroke:var(--blue);stroke-width:1.2;opacity:.7}
"""

PAGE = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:24px 20px 60px;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:26px;margin:0 0 2px;overflow-wrap:anywhere}h2{font-size:18px;margin:34px 0 10px}
h3{font-size:15px;margin:18px 0 6px;overflow-wrap:anywhere}
.soft,small{color:var(--soft)}p{margin:4px 0 10px;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px;margin:18px 0 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px}
.tile b{display:block;font-size:24px;font-weight:600;letter-spacing:-.01em}.tile em{font-style:normal;
color:var(--green)}
.tile em.up{color:var(--orange)}
.wide{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px}
pre{margin:0;font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:nth-child(-n+2),td:nth-child(-n+2),.notes td,.notes th{text-align:left}
.notes td{white-space:normal;vertical-align:top;overflow-wrap:anywhere}.notes td:first-child{width:28%}
.kind{margin:12px 0 2px}.figures{max-width:620px}.figures td:nth-child(2),.figures th:nth-child(2){text-align:right}
tbody tr:last-child td{border-bottom:0}thead th{color:var(--soft);font-weight:600}
.layers thead{position:sticky;top:0;background:var(--card)}
.layers{max-height:640px;overflow:auto}.short{max-height:430px}
th button{all:unset;cursor:pointer}th button:focus-visible{outline:2px solid var(--blue)}
th[aria-sort=ascending] button::after{content:" \\25B2"}
th[aria-sort=descending] button::after{content:" \\25BC"}
tr.peakrow td{background:var(--orangebg)}
svg.memory{width:100%;height:auto;min-width:680px;display:block}
.rule{stroke:var(--line)}polygon.before{fill:var(--soft);fill-opacity:.16;stroke:var(--soft);stroke-opacity:.7}
rect.before{fill:var(--soft);fill-opacity:.35}polygon.after{fill:var(--blue);fill-opacity:.5;stroke:var(--blue)}
rect.after{fill:var(--blue);fill-opacity:.6}
.over{fill:transparent}.over:hover{fill:var(--ink);fill-opacity:.14}
.peak.before{fill:var(--soft)}.peak.after{fill:var(--orange)}svg text.mark{fill:var(--ink);font-size:12px;
paint-order:stroke;stroke:var(--card);stroke-width:4px}
.alive td:nth-child(3),.alive th:nth-child(3){text-align:left}
#view{position:relative;border:1px solid var(--line);border-radius:10px;background:var(--card);overflow:hidden}
#graph{display:block;width:100%;height:min(74vh,820px);touch-action:none;cursor:grab}
#graph:active{cursor:grabbing}#graph .box{cursor:pointer;outline:none}
#graph .box:focus-visible>.face,#graph .box.here>.face{stroke-width:3}#graph .box.hit>.face{stroke:var(--green);
stroke-width:3;stroke-dasharray:5 3}
svg text.side{font-size:13px;font-weight:600;fill:var(--ink)}
.bar{display:flex;flex-wrap:wrap;gap:8px;align-items:center;margin:0 0 8px}
.bar button,.bar input{font:inherit;font-size:13.5px;color:var(--ink);background:var(--card);border:1px solid
var(--line);border-radius:7px;padding:4px 10px}.bar button{cursor:pointer}.bar input{min-width:190px}
.bar button:hover{border-color:var(--soft)}.bar button[aria-pressed=true]{background:var(--bluebg);
border-color:var(--blue)}
.bar button:focus-visible,.bar input:focus-visible{outline:2px solid var(--blue)}
.bar .gap{flex:1}#found{font-size:13px;color:var(--soft);min-width:76px}
#side{margin:10px 0 0}#side h3{margin:0 0 2px}#side .told{border-left:3px solid var(--orange);padding-left:9px;
margin:3px 0}
td.bars{background:linear-gradient(90deg,var(--bluebg) var(--w),transparent 0)}
.plan{list-style:none;padding:0;margin:8px 0}.plan li{margin:6px 0}.plan code{background:var(--grey);padding:1px 6px;
border-radius:5px;font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--soft);margin:0 0 8px}
.key i{display:inline-block;width:14px;height:10px;border-radius:3px;margin-right:6px;border:1px solid}
.i-b{background:var(--bluebg);border-color:var(--blue)!important}.i-f{background:var(--orangebg);
border-color:var(--orange)!important}
.i-l{background:var(--grey);border-color:var(--soft)!important}.i-t{background:var(--violetbg);
border-color:var(--violet)!important}.i-g{background:var(--greenbg);border-color:var(--green)!important}
.i-n{background:none;border:2px solid var(--orange)!important}
details{border-top:1px solid var(--line);padding:5px 2px}details:first-of-type{border-top:0}
summary{cursor:pointer;overflow-wrap:anywhere}
details:target,details.found{background:var(--bluebg)}
@media(max-width:640px){body{padding:14px 12px 40px}h1{font-size:21px}.tiles{grid-template-columns:1fr 1fr;
gap:8px}
.tile{padding:9px 11px}.tile b{font-size:18px}.notes td,.notes th{display:block;width:100%!important;
border:0;padding:2px 0}
.notes td:last-child{border-bottom:1px solid var(--line);padding-bottom:6px}
.notes td:first-child{font-weight:600}}
"""

SPLITNET = """
.notes+.wide{margin-top:12px}svg.classes{margin:0 0 12px}svg.classes:last-child{margin:0}svg text.end{text-anchor:end}
svg.classes text.name{font-weight:400}
svg .in{fill:var(--blue);stroke:var(--card)}svg .out{fill:none;stroke:var(--line);stroke-width:.7}
.blocks{display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:14px}
figure{margin:0;overflow-wrap:anywhere}figcaption{font-size:13px;line-height:1.35;padding-top:4px}
svg.block{width:100%}svg image{image-rendering:pixelated}
svg .border{fill:none;stroke:var(--orange);stroke-width:1.2}
"""

PRINT = """
@media print{.bar,#side,.over,.key span{display:none}body{max-width:none;padding:0;background:none}
.tiles{grid-template-columns:repeat(4,1fr)}#graph{height:56vh}
.layers{max-height:none;overflow:visible}.wide{overflow:visible;break-inside:auto}tr{break-inside:avoid}
h2,h3{break-after:avoid}}
"""

CSS = COLOURS + GRAPH + PAGE + SPLITNET + PRINT
