"""The page of `hrgan judge`: its text, style and script. No server, no network; answers stay in the browser until a
person saves them."""

from __future__ import annotations

import base64
import hashlib
import json
from string import Template

from hrgan.apps.judge_pool import MANY_PERSONS, ONE_PERSON, Record
from hrgan.page import STYLE, text


def page_of(about: Record, pictures: list[tuple[str, str]], second: list[bool]) -> str:
    """about: what the results say of the quiz. pictures: pairs of base64 of WebP. second: of each pair, whether the
    second is the real one."""
    key = bytes(sum(bit << place for place, bit in enumerate(second[at : at + 8])) for at in range(0, len(second), 8))
    quiz = {
        "about": about,
        # Packed, so that who opens the browser's tools for another reason does not read the answers.
        "key": base64.b64encode(key).decode(),
        "methods": [ONE_PERSON, MANY_PERSONS],
        "pictures": pictures,
    }
    limit, pairs = about["seconds"], about["pairs"]
    return Template(PAGE).substitute(
        style=STYLE + CSS,
        style_hash=_hash(STYLE + CSS),
        script=SCRIPT,
        script_hash=_hash(SCRIPT),
        name=text(about["target"]),
        size=" × ".join(map(str, about["size"])),
        pairs=f"{pairs} pair{'s' * (pairs > 1)}",
        count=pairs,
        limit=f" Each pair disappears after {limit:g} s; answer then or before." if limit else "",
        kimg=f"{about['nimg'] / 1000:g}",
        protocol=text(about["protocol"]),
        quiz=json.dumps(quiz, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _hash(code: str) -> str:
    """What the page's policy allows: this code and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}"


CSS = """[hidden] { display: none !important; }
button, input { font: inherit; color: inherit; }
button, .file span { background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: .55rem 1.1rem; cursor: pointer; }
button:hover, .file:hover span { border-color: var(--plain); }
button:focus-visible, input:focus-visible, .file:focus-within span { outline: 3px solid var(--plain);
  outline-offset: 2px; }
.main { background: var(--plain); border-color: var(--plain); color: var(--back); font-weight: 600; }
.quiet { background: none; border: 0; padding: .3rem 0; color: var(--soft); text-decoration: underline; }
.row { display: flex; flex-wrap: wrap; gap: .7rem; align-items: center; margin: 1.2rem 0; }
.read { max-width: 42rem; margin-top: .8rem; }
.soft { color: var(--soft); font-size: .9rem; }
form label { display: block; font-weight: 600; }
form input { width: min(100%, 22rem); background: var(--back); border: 1px solid var(--soft); border-radius: 6px;
  padding: .55rem .7rem; }
kbd { border: 1px solid var(--line); border-radius: 4px; padding: 0 .35em; background: var(--panel); }
.top { display: flex; justify-content: space-between; align-items: baseline; gap: 1rem; }
progress { width: 100%; height: .5rem; margin: .4rem 0 1rem; accent-color: var(--plain); display: block; }
#trial h1 { font-size: 1.35rem; text-align: center; margin: 0 0 .8rem; }
.stage { display: flex; justify-content: center; gap: .75rem; }
.stage button { padding: 4px; line-height: 0; touch-action: manipulation; user-select: none; }
.stage img { margin: 0; max-width: none; }
.away img { visibility: hidden; }
.hint { text-align: center; min-height: 1.5em; }
.by-key { display: none; }
@media (hover: hover), (min-width: 48rem) { .by-key { display: inline; } .by-touch { display: none; } }
.number { font-size: 3rem; line-height: 1.1; font-weight: 600; margin: .8rem 0 .2rem;
  font-variant-numeric: tabular-nums; }
.problem { background: var(--warn); border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem; }
.file input { position: absolute; opacity: 0; width: 1px; height: 1px; }
.file span { display: inline-block; }
td button { padding: .1rem .7rem; }
.person { unicode-bidi: isolate; }
tfoot th, tfoot td { font-weight: 600; border-bottom: 0; white-space: nowrap; }
@media (max-width: 40rem) { th, td { padding-left: .5rem; } .less { display: none; }
  .wide { font-size: .85rem; } td button { padding: .1rem .4rem; } }
"""


SCRIPT = r""""use strict";
const quiz = JSON.parse(document.getElementById("quiz").textContent);
const about = quiz.about;
const SHELF = `hrgan-judge ${about.quiz}`;
const READY = 600;  // Milliseconds before a pair with a time limit, to look at the middle.
const TOO_SOON = 200;  // Milliseconds: the second click of a double click is no answer to the next pair.
const MOST_WIDE = 384;  // CSS pixels: larger than that, 32 x 32 pixels are blocks and no picture.
const $ = id => document.getElementById(id);

let current = null;  // Who judges now: {person, trials, plan}.
let results = [];  // Of those who are done, here or in files that were added.
let shownAt = null;  // When the pair was shown, null while none can be answered.
let hiding = 0;
let turn = 0;


// Statistics: the same numbers as hrgan/apps/judge_pool.py, where the methods are named

const Z = 1.959963984540054, RESAMPLES = 10000, TAIL = 250;

function wilson(wrong, trials) {
  const share = wrong / trials, spread = Z * Z / trials;
  const centre = (share + spread / 2) / (1 + spread);
  const half = Z * Math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread);
  return [Math.max(0, centre - half), Math.min(1, centre + half)];
}

function pooledInterval(wrongs, pairs) {
  const persons = wrongs.length, trials = persons * pairs;
  const [low, high] = wilson(wrongs.reduce((a, b) => a + b, 0), trials);
  if (persons < 2) return [low, high];
  const counts = [...wrongs].sort((a, b) => a - b), next = numbers(0), sums = new Float64Array(RESAMPLES);
  for (let i = 0; i < RESAMPLES; i++) for (let k = 0; k < persons; k++) sums[i] += counts[below(next, persons)];
  sums.sort();
  return [Math.min(low, sums[TAIL] / trials), Math.max(high, sums[RESAMPLES - 1 - TAIL] / trials)];
}

// Whole numbers below 2^32: mulberry32.
function numbers(seed) {
  let state = seed | 0;
  return () => {
    state = (state + 0x6D2B79F5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return (mixed ^ (mixed >>> 14)) >>> 0;
  };
}

const below = (next, count) => Math.floor(next() / 2 ** 32 * count);

function median(values) {
  const sorted = [...values].sort((a, b) => a - b), middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

const countWrong = trials => trials.filter(trial => !trial.correct).length;


// A person's own order and sides, so that persons do not share effects of order

function planOf(person) {
  let seed = 0x811c9dc5;  // FNV-1a
  for (const letter of `${about.quiz} ${person}`) seed = Math.imul(seed ^ letter.codePointAt(0), 0x01000193);
  const next = numbers(seed), order = quiz.pictures.map((_, pair) => pair);
  for (let i = order.length - 1; i > 0; i--) {
    const j = below(next, i + 1);
    [order[i], order[j]] = [order[j], order[i]];
  }
  return {order, swapped: order.map(() => below(next, 2))};
}

function sideOfReal(plan, number) {
  const pair = plan.order[number], key = atob(quiz.key).charCodeAt(pair >> 3) >> (pair & 7) & 1;
  return ["left", "right"][key ^ plan.swapped[number]];
}


// Trials

function show(name) {
  for (const screen of ["start", "trial", "end"]) $(screen).hidden = screen !== name;
  scrollTo(0, 0);
}

async function begin() {
  const mine = ++turn, number = current.trials.length, plan = current.plan;
  shownAt = null;
  clearTimeout(hiding);
  if (number === about.pairs) return finish();
  $("count").textContent = `Pair ${number + 1} of ${about.pairs}`;
  $("progress").value = number;
  $("stage").classList.add("away");
  $("ask").textContent = "Which picture is real?";
  show("trial");
  const sources = quiz.pictures[plan.order[number]], images = [$("left"), $("right")];
  images.forEach((image, side) => { image.src = `data:image/webp;base64,${sources[side ^ plan.swapped[number]]}`; });
  try {
    await Promise.all(images.map(image => image.decode()));  // Both appear in the same frame.
  } catch {
    if (mine === turn) $("ask").textContent = "This browser cannot show the pictures (WebP). Use a newer one.";
    return;
  }
  if (about.seconds) await new Promise(go => setTimeout(go, READY));
  if (mine !== turn) return;
  fit();
  $("stage").classList.remove("away");
  await new Promise(requestAnimationFrame);
  if (mine !== turn) return;
  shownAt = performance.now();
  if (about.seconds) hiding = setTimeout(() => $("stage").classList.add("away"), about.seconds * 1000);
}

// Small pictures by a whole number of the screen's pixels, without smoothing, and to one size on most screens; large
// ones made smaller, smoothly.
function fit() {
  const [height, width] = about.size, ratio = devicePixelRatio || 1, stage = $("stage");
  const most = Math.max(MOST_WIDE, width), down = Math.max(innerHeight - stage.offsetTop - 70, 120);
  const across = Math.min((stage.clientWidth - 12) / 2 - 10, most);
  const factor = Math.min(across / width, down / height) * ratio;
  const scale = (factor > 1 ? Math.floor(factor) : factor) / ratio;
  for (const image of [$("left"), $("right")]) {
    image.style.width = `${width * scale}px`;
    image.style.height = `${height * scale}px`;
    image.style.imageRendering = factor >= 1 ? "pixelated" : "auto";
  }
}

function answer(side) {
  const spent = shownAt === null ? 0 : performance.now() - shownAt;
  if (spent < TOO_SOON) return;
  const number = current.trials.length, real = sideOfReal(current.plan, number);
  current.trials.push({
    pair: current.plan.order[number], real, answer: side, milliseconds: Math.round(spent), correct: side === real,
  });
  keep();
  begin();
}

function finish() {
  const trials = current.trials, wrong = countWrong(trials);
  const result = {
    ...about, person: current.person, date: new Date().toISOString(), error_rate: wrong / trials.length,
    interval: wilson(wrong, trials.length), interval_method: quiz.methods[0],
    median_milliseconds: median(trials.map(trial => trial.milliseconds)), trials,
  };
  current = null;
  results.push(result);
  keep();
  showResults(result);
}


// Results

const percent = share => `${(100 * share).toFixed(1)} %`;
const seconds = milliseconds => `${(milliseconds / 1000).toFixed(1)} s`;
const range = ([low, high]) => `${(100 * low).toFixed(1)} to ${percent(high)}`;

function showResults(mine) {
  $("mine").hidden = !mine;
  $("end-title").textContent = mine ? "Your result" : "Results";
  if (mine) {
    const wrong = countWrong(mine.trials);
    $("who").textContent = mine.person;
    $("rate").textContent = percent(mine.error_rate);
    $("detail").textContent = `is your error rate: in ${wrong} of ${about.pairs} pairs you took the generated ` +
      `picture for the real one. 95 % interval: ${range(mine.interval)} (${quiz.methods[0]}). ` +
      `Median time: ${seconds(mine.median_milliseconds)}.`;
    $("save").onclick = () => save(mine);
  }
  fillTable();
  $("problems").replaceChildren();
  show("end");
}

function fillTable() {
  const rows = results.map(result => {
    const row = document.createElement("tr"), name = document.createElement("th"), wrong = countWrong(result.trials);
    const button = document.createElement("button");
    name.scope = "row";
    name.className = "person";
    name.textContent = result.person;
    button.textContent = "Save";
    button.setAttribute("aria-label", `Save the result of ${result.person}`);
    button.onclick = () => save(result);
    const times = result.trials.map(trial => trial.milliseconds);
    row.append(name, ...cells(wrong, about.pairs, wilson(wrong, about.pairs), seconds(median(times))));
    row.lastChild.append(button);
    return row;
  });
  $("rows").replaceChildren(...rows);
  $("all").hidden = !results.length;
  if (!results.length) return;
  const wrongs = results.map(result => countWrong(result.trials)), persons = wrongs.length;
  const total = wrongs.reduce((a, b) => a + b, 0), interval = pooledInterval(wrongs, about.pairs);
  const name = document.createElement("th");
  name.scope = "row";
  name.textContent = `Pooled (${persons})`;
  $("pooled").replaceChildren(name, ...cells(total, persons * about.pairs, interval, ""));
  $("method").textContent = `Interval of the last line: ${quiz.methods[persons > 1 ? 1 : 0]}` +
    (persons > 1 ? ` (${RESAMPLES.toLocaleString("en")} resamples), because the trials of one person are not ` +
      "independent. Of fewer than ten persons it is rough." : ".");
}

function cells(wrong, trials, interval, time) {
  return [`${wrong} of ${trials}`, percent(wrong / trials), range(interval), time, ""].map((content, column) => {
    const cell = document.createElement("td");
    cell.textContent = content;
    if (column === 0 || column === 3) cell.className = "less";
    return cell;
  });
}

function save(result) {
  const link = document.createElement("a");
  const safe = name => name.replace(/[^\p{L}\p{N}_.-]+/gu, "-").slice(0, 60);
  link.href = URL.createObjectURL(new Blob([JSON.stringify(result, null, 1) + "\n"], {type: "application/json"}));
  link.download = `judge-${safe(about.target)}-${safe(result.person)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function addFiles(files) {
  const problems = [];
  for (const file of files) {
    try {
      const note = addResult(parsed(await file.text()));
      if (note) problems.push(`${file.name}: ${note}`);
    } catch (error) {
      problems.push(`${file.name}: ${error.message}`);
    }
  }
  keep();
  fillTable();
  $("problems").replaceChildren(...problems.map(problem => {
    const line = document.createElement("p");
    line.className = "problem";
    line.textContent = problem;
    return line;
  }));
}

function parsed(content) {
  try {
    return JSON.parse(content);
  } catch {
    throw new Error("no JSON, so no result of hrgan judge");
  }
}

// Adds a result; returns what is to be said of it. Throws an Error where it cannot be pooled with the others.
function addResult(record) {
  const problem = fault(record);
  if (problem) throw new Error(problem);
  if (record.quiz !== about.quiz || record.pairs !== about.pairs) {
    const kimg = typeof record.nimg === "number" ? ` at ${record.nimg / 1000} kimg` : "";
    throw new Error(`quiz: of another page (${record.target}${kimg}, ${record.pairs} pairs) than this one ` +
      `(${about.target} at ${about.nimg / 1000} kimg, ${about.pairs} pairs); pool the results of one page only`);
  }
  const earlier = results.find(result => result.person === record.person);
  if (!earlier) {
    results.push(record);
  } else if (sameTrials(earlier.trials, record.trials)) {
    return `the same result as one that is here; counted once`;
  } else {
    throw new Error(`person: ${shown(record.person)} is here with other answers; leave one out`);
  }
}

function sameTrials(some, others) {
  const names = ["pair", "real", "answer", "milliseconds", "correct"];
  return some.every((trial, number) => names.every(name => trial[name] === others[number][name]));
}

function fault(record) {
  const isObject = value => typeof value === "object" && value !== null && !Array.isArray(value);
  const whole = value => Number.isInteger(value);
  if (!isObject(record) || record.format !== about.format) {
    const found = isObject(record) ? record.format : null;
    return `format: ${shown(found)}, expected ${shown(about.format)}, as hrgan judge's pages write it`;
  }
  for (const name of ["person", "target", "quiz"]) {
    if (typeof record[name] !== "string" || !record[name].trim()) {
      return `${name}: ${shown(record[name])}, expected text`;
    }
  }
  const {pairs, trials} = record, seen = new Set();
  if (!whole(pairs) || pairs < 1) return `pairs: ${shown(pairs)}, expected a whole number from 1`;
  if (!Array.isArray(trials) || trials.length !== pairs) {
    return `trials: ${Array.isArray(trials) ? trials.length : shown(trials)}, expected ${pairs}`;
  }
  for (const [number, trial] of trials.entries()) {
    const {pair, real, answer, milliseconds, correct} = isObject(trial) ? trial : {};
    const where = `trials[${number}]`;
    if (!whole(pair) || pair < 0 || pair >= pairs || seen.has(pair)) {
      return `${where}.pair: ${shown(pair)}, expected each from 0 to ${pairs - 1} once`;
    }
    for (const [name, side] of Object.entries({real, answer})) {
      if (side !== "left" && side !== "right") return `${where}.${name}: ${shown(side)}, expected left or right`;
    }
    if (!whole(milliseconds) || milliseconds < 0) {
      return `${where}.milliseconds: ${shown(milliseconds)}, expected a whole number from 0`;
    }
    if (correct !== (answer === real)) {
      return `${where}.correct: ${shown(correct)}, but the real one was ${real} and the answer ${answer}`;
    }
    seen.add(pair);
  }
  const wrong = countWrong(trials), rate = record.error_rate;
  if (typeof rate !== "number" || !(Math.abs(rate - wrong / pairs) <= 1e-9)) {
    return `error_rate: ${shown(rate)}, but its trials have ${wrong} of ${pairs} wrong`;
  }
  return null;
}

function shown(value) {
  if (typeof value === "object" && value !== null) return Array.isArray(value) ? "a list" : "an object";
  const line = JSON.stringify(value ?? null);
  return line.length <= 60 ? line : `${line.slice(0, 60)}...`;
}


// What a reload must not lose, nor a closed tab where the browser keeps anything for a file. Chromium 156 may load a
// file again with an empty localStorage, which loses what is written there, too: so the tab's history has it as well.

function keep() {
  const judging = current && {person: current.person, trials: current.trials};
  const kept = JSON.stringify({current: judging, results});
  try {
    history.replaceState({[SHELF]: kept}, "");
  } catch { /* Safari takes 100 in 30 seconds; nobody judges as fast. */ }
  try {
    localStorage.setItem(SHELF, kept);
    return true;
  } catch {
    return false;
  }
}

function recall() {
  let kept = null;
  try {
    kept = JSON.parse(history.state?.[SHELF] ?? localStorage.getItem(SHELF));
  } catch {
    return;
  }
  for (const record of kept?.results ?? []) {
    try { addResult(record); } catch { /* Nothing that this page wrote. */ }
  }
  const {person, trials} = kept?.current ?? {};
  if (typeof person !== "string" || !Array.isArray(trials)) return;
  const plan = planOf(person);
  if (trials.every((trial, number) => trial?.pair === plan.order[number])) current = {person, trials, plan};
}


// What people do

function start(event) {
  event.preventDefault();
  const person = $("person").value.normalize("NFC").replace(/[\p{Cc}\p{Cs}]/gu, "").replace(/\s+/g, " ").trim();
  const taken = results.some(result => result.person === person);
  $("taken").hidden = !taken;
  if (!person || taken) return;
  current = {person, trials: [], plan: planOf(person)};
  keep();
  begin();
}

function toStart() {
  turn++;
  clearTimeout(hiding);
  shownAt = current = null;
  keep();
  $("person").value = "";
  $("taken").hidden = true;
  show("start");
  $("person").focus();
}

$("form").addEventListener("submit", start);
$("left").parentElement.addEventListener("click", () => answer("left"));
$("right").parentElement.addEventListener("click", () => answer("right"));
document.addEventListener("keydown", event => {
  const side = {ArrowLeft: "left", ArrowRight: "right"}[event.key];
  if (!side || $("trial").hidden) return;
  event.preventDefault();
  if (!event.repeat) answer(side);
});
$("stop").addEventListener("click", () => {
  const done = current.trials.length;
  if (!done || confirm(`Stop, and throw away ${done === 1 ? "1 answer" : `${done} answers`}?`)) toStart();
});
$("next").addEventListener("click", toStart);
$("look").addEventListener("click", () => showResults(null));
$("files").addEventListener("change", event => {
  addFiles([...event.target.files]).then(() => { event.target.value = ""; });
});
addEventListener("resize", () => { if (!$("trial").hidden) fit(); });

recall();
$("forgets").hidden = keep();
if (current) begin(); else show("start");
"""


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src '$style_hash';
 script-src '$script_hash'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<link rel="icon" href="data:,">
<title>$name: real or generated?</title>
<style>$style</style>
</head>
<body>
<main>
<noscript><p class="problem">This quiz needs JavaScript, which is switched off here.</p></noscript>
<div id="start" hidden>
<header><h1>Real or generated?</h1><p>$name, $size pixels, $pairs</p></header>
<div class="read">
<p>Of each pair, one picture is real and one was made by a computer. Choose the one that you think is <b>real</b>:
<span class="by-touch">tap it</span><span class="by-key">click or tap it, or press <kbd>←</kbd> or <kbd>→</kbd></span>.
Where you cannot tell, guess.$limit</p>
<p>Your result comes at the end. Nothing leaves this page unless you save and send it.</p>
<form id="form">
<div class="row"><div><label for="person">Your name or ID</label>
<input id="person" maxlength="60" required autocomplete="off" spellcheck="false"></div></div>
<p id="taken" class="problem" role="alert" hidden>There is a result of this name already. Judging the same pairs twice
does not count; use another name if you are another person.</p>
<div class="row"><button class="main">Start</button><button type="button" id="look" class="quiet">Only look at
results</button></div>
</form>
<p class="soft">The name tells persons apart in the results and decides the order of your pairs. The answers are in the
source of this page, so please do not look there.</p>
<p id="forgets" class="problem" hidden>This browser keeps nothing for this page: do not close it before you have
saved your result.</p>
</div>
</div>
<div id="trial" hidden>
<div class="top"><span id="count" aria-live="polite"></span><button id="stop" class="quiet">Stop</button></div>
<progress id="progress" max="$count" value="0" aria-label="Pairs judged"></progress>
<h1 id="ask">Which picture is real?</h1>
<div id="stage" class="stage away"><button aria-label="The left picture is real"><img id="left" alt=""
draggable="false"></button><button aria-label="The right picture is real"><img id="right" alt=""
draggable="false"></button></div>
<p class="hint soft"><span class="by-touch">Tap the real one.</span><span class="by-key">Click or tap the real one, or
press <kbd>←</kbd> or <kbd>→</kbd>.</span></p>
</div>
<div id="end" hidden>
<header><h1 id="end-title"></h1><p>$name at $kimg kimg, $size pixels, $pairs; $protocol</p></header>
<div id="mine" class="read">
<p class="number" id="rate"></p>
<p><b id="who" class="person"></b>, this <span id="detail"></span></p>
<p>50 % would mean that you cannot tell generated pictures from real ones, 0 % that you always can.</p>
<div class="row"><button id="save" class="main">Save my result</button></div>
</div>
<section>
<h2>All persons</h2>
<div id="all">
<div class="wide"><table><thead><tr><th scope="col">person</th><th scope="col" class="less">wrong</th>
<th scope="col">error rate</th><th scope="col">95 % interval</th>
<th scope="col" class="less">median time</th><th scope="col"></th></tr></thead>
<tbody id="rows"></tbody><tfoot><tr id="pooled"></tr></tfoot></table></div>
<p class="soft" id="method"></p>
</div>
<div id="problems" role="alert"></div>
<div class="row"><button id="next">Next person</button><label class="file"><input id="files" type="file" multiple
accept=".json,application/json"><span>Add results from files</span></label></div>
<p class="soft">The same numbers at the command line: <code>hrgan judge pool FILES</code></p>
</section>
</div>
</main>
<script type="application/json" id="quiz">$quiz</script>
<script>$script</script>
</body>
</html>
"""
