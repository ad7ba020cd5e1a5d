"""Style sheet of the page: light and dark, wide and narrow."""

# Colors of texts and lines have a contrast of at least 4.5 to their background, in both schemes.
STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #5b6573; --line: #dde2e9; --paper: #fafaf8; --card: #fff;
  --good: #0b7a55; --bad: #b3372f; --fair: #8a5a00; --accent: #1f5fa8; --warn: #fff4e0;
  --c0: #1f5fa8; --c1: #b35806; --c2: #0b7a55; --c3: #8e3b8a;
  --c4: #b3372f; --c5: #00707f; --c6: #5f6500; --c7: #6b4b3e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa5b3; --line: #343a43; --paper: #14171b;
  --card: #1c2026; --good: #4cc79a; --bad: #f0837a; --fair: #e0b354; --accent: #7db4ef; --warn: #33291a;
  --c0: #7db4ef; --c1: #f0a45d; --c2: #4cc79a; --c3: #d79be0;
  --c4: #f0837a; --c5: #4fc3d9; --c6: #c5cf5a; --c7: #c8a893 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.5rem 3rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 ui-sans-serif, system-ui, sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 1.8rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .4rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .6rem } h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
p { margin: .4rem 0 .8rem } .soft, th, dt, footer { color: var(--soft) } footer { margin-top: 3rem; font-size: .85rem }
code { font-size: .92em } details summary { cursor: pointer } ol, ul { margin: .4rem 0; padding-left: 1.4rem }

.state > .soft { margin-left: .6rem; font-size: .85rem; overflow-wrap: anywhere }
.running, .finished, .stopped { padding: .1rem .6rem; border-radius: 1rem; font-weight: 600; font-size: .85rem;
  color: var(--paper); background: var(--accent) }
.finished { background: var(--good) } .stopped { background: var(--fair) }
.warn { background: var(--warn); border-radius: .5rem; padding: .6rem 1rem; margin: .8rem 0; overflow-wrap: anywhere }
ul.warn { padding-left: 2rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: .75rem; margin: 1.25rem 0 }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem;
  display: flex; flex-direction: column; overflow-wrap: anywhere }
.tile b { font-size: 1.2rem; font-weight: 650 } .tile .soft { font-size: .8rem }

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 16.5rem), 1fr)); gap: 1rem }
figure { margin: 0; min-width: 0 }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem 1rem .5rem;
  display: flex; flex-direction: column }
.chart.wide { margin-bottom: 1rem } .chart .soft { font-size: .82rem } .chart > p { margin: .2rem 0 }
figcaption { line-height: 1.4; margin-bottom: .5rem; overflow-wrap: anywhere }
.keys { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .82rem } .key b { font-weight: 600 }
.key i { display: inline-block; width: .7rem; height: .7rem; border-radius: .2rem; margin-right: .35rem }
.plot { display: grid; grid-template: 11rem 1.5rem / 2.9rem 1fr; font-size: .75rem; color: var(--soft);
  margin-top: auto }
.wide .plot { grid-template-rows: 16rem 1.5rem }
.plot svg { width: 100%; height: 100%; overflow: visible; grid-area: 1 / 2 } .x, .y { position: relative }
.y span { position: absolute; right: .5rem; transform: translateY(-50%); white-space: nowrap }
.name { grid-area: 2 / 1; padding: .3rem .5rem 0 0; text-align: right }
.x { grid-area: 2 / 2 } .x span { position: absolute; top: .3rem; transform: translateX(-50%); white-space: nowrap }
.x span:first-child { transform: none } .x span:last-child:not(:first-child) { transform: translateX(-70%) }
svg path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-linecap: round }
svg rect { fill: transparent } svg rect:hover { fill: var(--ink); fill-opacity: .08 }
.grid { stroke: var(--line); stroke-width: 1 } .line { stroke-width: 1.8 } svg .faint { opacity: .3; stroke-width: 1 }
.dots { stroke-width: 5 } .ring { stroke-width: 12 } .hole { stroke: var(--card); stroke-width: 7 }
.bars { stroke-width: 2; opacity: .6 } .mark { stroke: var(--soft); stroke-dasharray: 4 4 } .gaps { stroke: var(--bad) }
svg .band { stroke: none; fill-opacity: .14 } svg .area { stroke: none; fill-opacity: .85 }

.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; margin: .8rem 0 }
th, td { text-align: left; padding: .35rem 1.1rem .35rem 0; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 500; font-size: .82rem } .number { text-align: right }

.tabs input { position: absolute; opacity: 0; pointer-events: none }
.tabs label { display: inline-block; padding: .3rem .9rem; border: 1px solid var(--line); border-radius: 2rem;
  margin-right: .5rem; cursor: pointer; background: var(--card) }
.tabs input:checked + label { border-color: var(--accent); color: var(--accent); font-weight: 600 }
.tabs input:focus-visible + label { outline: 2px solid var(--accent); outline-offset: 2px } .panel { display: none }
#tab-worst:checked ~ #panel-worst, #tab-changed:checked ~ #panel-changed,
#tab-random:checked ~ #panel-random { display: block } .panel > p { margin-top: .8rem }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem;
  align-items: start }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; min-width: 0 }
.card .text { padding: .5rem .9rem .8rem } .card p { margin: 0 0 .35rem; font-size: .8rem } .card dl { margin: 0 }
.source { display: block; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .8rem; font-size: .9rem }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0; white-space: pre-wrap } dt { font-size: .85rem }
.answer { font-weight: 600 } .answer details { font-weight: 400 }
.good { color: var(--good) } .bad { color: var(--bad) } .fair { color: var(--fair) }
.media { background: color-mix(in srgb, var(--line) 45%, var(--card)); padding: .5rem; display: flex; flex-wrap: wrap;
  gap: .5rem; justify-content: center; align-items: center } .media p { width: 100%; text-align: center; margin: 0 }
.media img { max-width: 100%; height: auto; max-height: 13rem; width: auto; border-radius: .25rem; display: block }
.several img { max-width: calc(50% - .25rem); max-height: 7rem }
.missing { border: 1px dashed var(--soft); border-radius: .25rem; padding: .6rem; font-size: .78rem; color: var(--soft);
  overflow-wrap: anywhere; max-width: 100% } .missing b { font-weight: 500; color: var(--ink) }

.flags { font-size: .85rem }
@media (min-width: 60rem) { .flags { grid-template-columns: max-content 1fr max-content 1fr } }
@media (max-width: 30rem) { body { padding: 1.25rem .8rem } dl.flags { grid-template-columns: 1fr; gap: 0 }
  .flags dd { margin-bottom: .4rem } .tiles { grid-template-columns: 1fr 1fr } .tile b { font-size: 1.05rem } }
.c { stroke: var(--c) } i.c { background: var(--c) } svg :is(.band, .area) { fill: var(--c) }
""" + "".join(f".c{number} {{ --c: var(--c{number}) }}" for number in range(8))
