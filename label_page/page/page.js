"use strict";
// One pair at a time: show it, send what is said of it, show the next, which came with the answer.

const byId = (id) => document.getElementById(id);
const POLL_MS = 1000; // while there is no pair
const LOOK_MS = 10000; // while there is one: is it still needed?
const IDLE_MS = 120000; // nobody touched anything for so long: the pair may go to somebody else
const RETRY_MS = 1000;

let state = { pair: null, csrf: "" };
let busy = false;
let touched = Date.now();
let timer = 0;

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

function say(text, trouble = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("trouble", trouble);
}

// Asks until there is an answer: the same click may come in twice, and counts once.
async function request(method, path, body) {
  for (;;) {
    try {
      const reply = await fetch(path, {
        method,
        headers: { "Content-Type": "application/json", "X-CSRF-Token": state.csrf },
        body: body === undefined ? undefined : JSON.stringify(body),
      });
      if (reply.status !== 429 && reply.status < 500) return { status: reply.status, data: await reply.json() };
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
    }
    say("No connection to the run. What you said is kept here and sent again …", true);
    await pause(RETRY_MS);
  }
}

function percent(share) {
  return `${Math.round(100 * share)}%`;
}

function showProgress() {
  const { counts, budget, person } = state;
  const parts = [`${counts.labelled} of ${budget} labels`, `${Math.max(budget - counts.labelled, 0)} left`, `${counts.mine} by ${person}`];
  if (state.win_rate !== null) parts.push(`win rate so far ${percent(state.win_rate)}`);
  byId("progress").textContent = parts.join(" · ");
  byId("bar").hidden = false;
  byId("bar").value = Math.min(counts.labelled / budget, 1);
}

function showPair() {
  const pair = state.pair;
  byId("pair").hidden = pair === null;
  byId("choices").hidden = false;
  for (const button of document.querySelectorAll(".choice[data-verdict]")) {
    button.hidden = !state.verdicts.includes(button.dataset.verdict);
  }
  lock(pair === null);
  if (pair === null) return;
  byId("prompt").innerHTML = pair.prompt; // made by the server, of Markdown in which nothing is markup
  byId("left").textContent = pair.left;
  byId("right").textContent = pair.right;
  byId("reason").value = "";
  byId("pair").style.animation = "none";
  void byId("pair").offsetWidth;
  byId("pair").style.animation = "";
  window.scrollTo(0, 0);
  byId("prompt-title").focus({ preventScroll: true });
}

function lock(locked) {
  for (const button of document.querySelectorAll("#choices .choice, #skip, #reason")) button.disabled = locked;
  byId("undo").disabled = busy || !state.can_undo;
}

// Takes in what the server says; returns whether the person is known.
function take(reply) {
  if (reply.status === 401 || reply.status === 403) {
    byId("pair").hidden = byId("choices").hidden = true;
    say(reply.data.error, true);
    return false;
  }
  const before = state.pair;
  const guidelines = state.guidelines;
  state = { ...state, ...reply.data };
  byId("join").hidden = true;
  if (state.guidelines !== guidelines) {
    byId("guidelines").hidden = !state.guidelines;
    byId("guidelines-text").innerHTML = state.guidelines; // likewise
    byId("guidelines").open = !localStorage.getItem("guidelines-read");
  }
  showProgress();
  if (!before || !state.pair || before.ticket !== state.pair.ticket || byId("pair").hidden) showPair();
  else lock(false);
  return true;
}

function waiting() {
  return state.counts.labelled >= state.budget
    ? "All labels of this run are given. Thank you."
    : "The model is writing: the next pair comes by itself.";
}

function opinion(verdict, foreseen) {
  const said = { left: "A", slightly_left: "A", right: "B", slightly_right: "B", tie: "a tie", both_bad: "both bad" }[verdict];
  if (said === undefined) return "Skipped.";
  if (foreseen === null || foreseen === undefined) return `You said ${said}.`;
  const better = foreseen >= 0.5 ? "A" : "B";
  return `You said ${said}. The model's guess was ${better}, with ${percent(Math.max(foreseen, 1 - foreseen))}.`;
}

function schedule() {
  clearTimeout(timer);
  timer = setTimeout(look, state.pair ? LOOK_MS : POLL_MS);
}

async function look() {
  if (!busy && !(state.pair && Date.now() - touched > IDLE_MS)) {
    const shown = state.pair;
    const reply = await request("GET", shown ? `/state?shown=${shown.number}` : "/state");
    if (busy || shown !== state.pair) return schedule(); // something was said meanwhile
    const troubled = byId("status").classList.contains("trouble");
    if (!take(reply)) return;
    if (shown && state.pair !== shown && (!state.pair || state.pair.number !== shown.number)) say("That pair is not needed any more. " + (state.pair ? "" : waiting()));
    else if (!state.pair) {
      if (!byId("status").textContent.endsWith(waiting())) say(waiting());
    } else if (troubled || !shown) say("");
  }
  schedule();
}

async function change(path, body, told) {
  if (busy) return;
  busy = true;
  lock(true);
  try {
    const reply = await request("POST", path, body);
    busy = false;
    if (!take(reply)) return;
    const text = reply.status === 200 ? told(reply.data) : reply.data.error;
    say(state.pair ? text : `${text} ${waiting()}`, reply.status !== 200);
  } finally {
    busy = false;
  }
  schedule();
}

function choose(verdict, reason = "") {
  const pair = state.pair;
  if (!pair || busy || !state.verdicts.includes(verdict)) return;
  localStorage.setItem("guidelines-read", "yes");
  byId("guidelines").open = false;
  change("/answer", { pair: pair.number, ticket: pair.ticket, verdict, reason }, (data) => opinion(verdict, data.foreseen));
}

function skip() {
  const reason = byId("reason").value;
  if (!state.pair || busy) return;
  if (!reason) {
    say("Choose why, then skip.");
    byId("reason").focus();
    return;
  }
  choose("skip", reason);
}

function undo() {
  if (state.can_undo) change("/undo", {}, () => "Taken back: say it anew.");
}

function keys() {
  const graded = state.verdicts && state.verdicts.includes("slightly_left");
  const verdicts = graded
    ? { 1: "left", 2: "slightly_left", 3: "slightly_right", 4: "right" }
    : { 1: "left", 2: "right" };
  return { ...verdicts, ArrowLeft: "left", ArrowRight: "right", t: "tie", x: "both_bad" };
}

document.addEventListener("keydown", (event) => {
  touched = Date.now();
  const inField = event.target.closest("input, select, textarea");
  if (event.target === byId("reason") && event.key === "Enter") skip();
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || inField) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const verdict = keys()[key];
  if (verdict) choose(verdict);
  else if (key === "s") byId("reason").focus();
  else if (key === "u") undo();
  else return;
  event.preventDefault();
});
document.addEventListener("pointerdown", () => { touched = Date.now(); });
document.addEventListener("visibilitychange", () => { if (!document.hidden && state.counts) { touched = Date.now(); look(); } });

function hint() {
  const shown = Object.entries(keys()).filter(([key]) => key.length === 1);
  for (const button of document.querySelectorAll("button[data-key]")) {
    const found = shown.find(([, verdict]) => verdict === button.dataset.verdict);
    const key = found ? found[0] : button.dataset.key;
    button.setAttribute("aria-keyshortcuts", key);
    const mark = button.querySelector("kbd") || button.appendChild(document.createElement("kbd"));
    mark.textContent = key;
    mark.setAttribute("aria-hidden", "true");
  }
}

async function join(token, name) {
  const reply = await request("POST", "/join", name ? { token, name } : { token });
  if (reply.status === 422) {
    byId("join").hidden = false;
    byId("name").focus();
    say(name ? reply.data.error : "");
    return;
  }
  if (reply.status !== 200) return say(reply.data.error, true);
  if (take(reply)) {
    history.replaceState(null, "", "/"); // the link is used up
    hint();
    say(state.pair ? "" : waiting());
    schedule();
  }
}

async function begin() {
  for (const button of document.querySelectorAll(".choice[data-verdict]")) {
    button.addEventListener("click", () => choose(button.dataset.verdict));
  }
  byId("skip").addEventListener("click", skip);
  byId("undo").addEventListener("click", undo);
  const token = location.hash.slice(1);
  const reply = await request("GET", "/state");
  if (reply.status === 200) {
    if (token) history.replaceState(null, "", "/");
    take(reply);
    hint();
    say(state.pair ? "" : waiting());
    schedule();
  } else if (token && token !== "choices") {
    byId("join").addEventListener("submit", (event) => {
      event.preventDefault();
      join(token, byId("name").value);
    });
    join(token);
  } else {
    say(reply.data.error, true);
  }
}

begin();
