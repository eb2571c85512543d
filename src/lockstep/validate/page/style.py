"""The page's style: light and dark, and narrow screens."""

STYLE = """
:root{--back:#fff;--text:#1d2330;--soft:#5b6475;--line:#dde1e8;--card:#f6f7f9;--good:#1a7f4b;--bad:#c0342b;
--warn:#946200;--blue:#2563c9;--orange:#c2570c}
@media (prefers-color-scheme:dark){:root{--back:#14171d;--text:#e6e9ef;--soft:#9aa3b2;--line:#2e343f;--card:#1c2129;
--good:#4cc38a;--bad:#ff7b72;--warn:#e0b341;--blue:#79a8ff;--orange:#f0a060}}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1000px;margin:0 auto;padding:20px 16px 60px}h1{font-size:1.5rem;margin:.2em 0;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:1.8em 0 .4em;overflow-wrap:anywhere}p{margin:.4em 0}small{color:var(--soft)}
a{color:var(--blue)}.verdict{font-weight:600}.verdict.complete{color:var(--good)}.verdict.partial{color:var(--warn)}
.verdict.failed,.reason,.outside{color:var(--bad)}.reason{overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 14px;margin:.6em 0;font-size:.92rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px}
table{border-collapse:collapse;width:100%;font-size:.88rem}th,td{padding:6px 10px;text-align:left;
border-bottom:1px solid var(--line);vertical-align:top}tr:last-child td{border-bottom:0}
th{color:var(--soft);font-weight:600;background:var(--card)}.number{text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums}
.badge{font-size:.78rem;font-weight:600;padding:1px 8px;border-radius:99px;border:1px solid currentColor;white-space:nowrap}
.badge.passed{color:var(--good)}.badge.failed{color:var(--bad)}.badge.open{color:var(--warn)}
.badge.not-applicable{color:var(--soft)}
details{margin:.5em 0}summary{cursor:pointer;color:var(--soft);padding:4px 0}
ul{padding-left:1.2em;color:var(--soft);font-size:.88rem}
figure{margin:.8em 0;border:1px solid var(--line);border-radius:8px;padding:10px;background:var(--card)}
figcaption{font-size:.88rem;color:var(--soft)}svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font-size:12px}.grid{stroke:var(--line)}.limit{stroke:var(--soft);stroke-dasharray:5 4}
.dot,.series0{fill:var(--blue)}.series1{fill:var(--orange)}.bad{fill:var(--bad)}.series0,.series1{fill-opacity:.55}
polyline{fill:none;stroke-width:2}.line0{stroke:var(--blue)}.line1{stroke:var(--orange)}
.key{margin-left:12px;white-space:nowrap}.key i{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:5px}
.key0{background:var(--blue)}.key1{background:var(--orange)}
@media (max-width:560px){main{padding:12px 12px 40px}th,td{padding:5px 7px}svg{min-width:520px}figure{overflow-x:auto}}
"""
