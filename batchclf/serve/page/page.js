// The demo page. Whatever a user or a file gives is put into the page as text, never as HTML.

const TYPES = {
  csv: "text/csv",
  jsonl: "application/jsonlines",
  ndjson: "application/jsonlines",
  parquet: "application/vnd.apache.parquet",
};
const MOST_ROWS_SHOWN = 200;
const MOST_CELL_CHARS = 160;
const MOST_LINK_CHARS = 30000;
const MOST_JSON_CHARS = 200000;
const DEFAULTS = { short_text_chars: 300, max_length: null, max_body_bytes: Infinity };

const $ = (id) => document.getElementById(id);
let model = DEFAULTS;
let token = null;
let asked = null; // aborts the call in flight
let shown = ""; // the text whose result is on the page
let current = null; // the file that was chosen or dropped last
let lastFile = null; // and how it was labelled
let retry = null; // what to do again once there is a token

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// `quiet` where the page shows it anyway, and only a screen reader has to be told.
function say(text, quiet = false) {
  $("status").textContent = text;
  $("status").classList.toggle("quiet", quiet);
}

function reveal(section) {
  if (section.getBoundingClientRect().top > 0.6 * window.innerHeight) section.scrollIntoView();
}

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
  if (text) $("error").scrollIntoView({ block: "nearest" });
}

function hideResults() {
  for (const id of ["result", "table", "programs"]) $(id).hidden = true;
}

// ---- calls ----

class Refused extends Error {}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (token !== null) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is it running?");
  }
  if (response.status === 401) {
    $("access-note").textContent =
      token === null
        ? "This server answers only those who have its token. It stays in this tab."
        : "That is not the token.";
    $("access").hidden = false;
    $("token").focus();
    throw new Refused("");
  }
  if (!response.ok) {
    const wait = response.headers.get("Retry-After");
    const again = wait ? ` Try again in ${count(Number(wait), "second")}.` : "";
    let reason = `The server answered ${response.status}.`;
    try {
      reason = sentence((await response.json()).error.message);
    } catch {
      // not one of our answers: a proxy's
    }
    throw new Refused(reason + again);
  }
  return response;
}

function sentence(message) {
  const text = message.trim();
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : ".");
}

function invocations(parameters) {
  const query = new URLSearchParams(parameters).toString();
  return query ? `invocations?${query}` : "invocations";
}

async function run(what, work) {
  asked?.abort();
  const mine = (asked = new AbortController());
  complain("");
  say(what);
  try {
    await work(mine.signal);
  } catch (error) {
    if (mine !== asked) return; // a newer call has the page
    say("");
    if (error.name === "AbortError") return;
    if (!(error instanceof Refused)) throw error;
    if (!$("access").hidden) retry = () => run(what, work);
    hideResults();
    complain(error.message);
  }
}

// ---- a text ----

function classifyText(opensJson = false) {
  const text = $("text").value;
  if (!text.trim()) {
    complain("Paste a text first.");
    $("text").focus();
    return;
  }
  const body = JSON.stringify({ text });
  run("Reading …", async (signal) => {
    const began = performance.now();
    const response = await call(invocations({ details: "true" }), {
      method: "POST",
      body,
      signal,
      headers: { "Content-Type": "application/json", Accept: "application/json" },
    });
    const answer = await response.json();
    const total = performance.now() - began;
    shown = text;
    showText(text, answer, serverTime(response), total);
    showPrograms(answer, curl("application/json", "application/json", `-d ${quote(body)}`, { details: "true" }));
    $("copy-json-link").hidden = false;
    if (opensJson) {
      $("json-view").open = true;
      $("json-view").scrollIntoView();
    }
  });
}

function serverTime(response) {
  const found = /dur=([\d.]+)/.exec(response.headers.get("Server-Timing") ?? "");
  return found ? Number(found[1]) : null;
}

function showText(text, answer, modelMs, totalMs) {
  const best = answer.label ?? "no label";
  const verdict = answer.error
    ? "Not labelled"
    : answer.label === null
      ? `Not sure: ${Object.keys(answer.probs)[0]} at most, ${percent(answer.score)}`
      : `${best}, ${percent(answer.score)}`;
  $("verdict").textContent = verdict;
  const numChars = [...text].length;
  const isShort = numChars < model.short_text_chars;
  $("short").hidden = !isShort && !answer.error;
  $("short").textContent = answer.error
    ? sentence(answer.error.replace(/^\w+: /, ""))
    : `Too short to trust: ${count(numChars, "character")}. The model learned from whole articles; ` +
      `give it ${model.short_text_chars} or more.`;
  drawBars($("bars"), Object.entries(answer.probs ?? {}), 1, percent);
  drawFacts([
    ["Tokens read", answer.n_tokens.toLocaleString("en")],
    ["Model", modelMs === null ? null : `${modelMs.toFixed(1)} ms`],
    ["In all", `${totalMs.toFixed(1)} ms`],
  ]);
  showReading(text, answer);
  $("table").hidden = true;
  $("result").hidden = false;
  showCut();
  say(`${verdict}.${isShort && !answer.error ? " The text is too short to trust." : ""}`, true);
  reveal($("result"));
}

function drawBars(list, entries, whole, show) {
  list.replaceChildren(
    ...entries.map(([name, value]) => {
      const item = element("li");
      const track = element("span", undefined, "track");
      const fill = element("span", undefined, "fill");
      track.setAttribute("aria-hidden", "true");
      fill.style.width = `${(100 * value) / Math.max(whole, 1e-9)}%`;
      track.append(fill);
      item.append(element("span", name, "name"), track, element("span", show(value), "value"));
      return item;
    }),
  );
}

function drawFacts(facts) {
  $("facts").replaceChildren(
    ...facts
      .filter(([, value]) => value !== null)
      .map(([name, value]) => {
        const pair = element("div");
        pair.append(element("dt", name), element("dd", value));
        return pair;
      }),
  );
}

function showReading(text, answer) {
  const characters = [...text]; // the server counts characters, JavaScript halves of some
  const numRead = answer.read_chars ?? 0;
  const seen = characters.slice(0, numRead).join("");
  const rest = characters.slice(numRead).join("");
  const parts = [element("mark", seen)];
  if (answer.truncated) {
    parts.push(element("span", "the model stopped here", "cut"), element("span", rest, "unread"));
  } else if (rest) {
    parts.push(element("span", rest, "unread"));
  }
  $("reading").replaceChildren(...parts);
  const share = percent(numRead / Math.max(characters.length, 1));
  $("extent").textContent = answer.error
    ? "Nothing."
    : answer.truncated
      ? `The first ${count(answer.n_tokens, "token")}: ${share} of the text.`
      : "All of the text.";
}

function showCut() {
  const box = $("reading");
  const cut = box.querySelector(".cut");
  box.scrollTop = cut ? cut.offsetTop - box.offsetTop - box.clientHeight / 2 : 0;
}

// ---- a file ----

function fileType(file) {
  return TYPES[file.name.split(".").pop().toLowerCase()];
}

function classifyFile(file) {
  if (!file) {
    complain("Choose a file first.");
    $("file").focus();
    return;
  }
  current = file;
  const type = fileType(file);
  if (!type) {
    complain("The file's name must end in .csv, .jsonl or .parquet.");
    return;
  }
  if (file.size > model.max_body_bytes) {
    complain(`The file is larger than ${count(model.max_body_bytes >> 20, "MiB")}; use batchclf classify for it.`);
    return;
  }
  const parameters = { text_column: $("column").value.trim() || "text", keep_columns: "all" };
  lastFile = { file, type, parameters };
  run(`Labelling ${file.name} …`, async (signal) => {
    const began = performance.now();
    const response = await callWithFile(lastFile, "application/json", signal);
    const rows = await response.json();
    showTable(file.name, rows, parameters.text_column, performance.now() - began);
    $("copy-json-link").hidden = true;
    const send = `--data-binary @${quote(file.name)}`;
    showPrograms(rows, curl(type, "application/json", send, parameters));
  });
}

async function callWithFile({ file, type, parameters }, accept, signal) {
  try {
    return await call(invocations(parameters), {
      method: "POST",
      body: file,
      signal,
      headers: { "Content-Type": type, Accept: accept },
    });
  } catch (error) {
    // The server speaks to programs: of a body, and of a query.
    if (error instanceof Refused) {
      error.message = error.message
        .replace(/^Body\.\w+/, file.name)
        .replace("Name one of them with text_column in the query", "Write one of them under “Column with the text”");
    }
    throw error;
  }
}

function showTable(name, rows, textColumn, totalMs) {
  $("table-title").textContent = `${name}: ${count(rows.length, "row")}`;
  const counts = new Map();
  for (const row of rows) {
    const label = row.error ? "not labelled" : (row.label ?? "not sure");
    counts.set(label, (counts.get(label) ?? 0) + 1);
  }
  const sorted = [...counts].sort((a, b) => b[1] - a[1]);
  drawBars($("counts"), sorted, rows.length, (n) => n.toLocaleString("en"));
  const columns = columnsOf(rows, textColumn);
  $("columns").replaceChildren(
    ...columns.map((column) => {
      const cell = element("th", column, isNumber(column) ? "number" : "");
      cell.scope = "col";
      return cell;
    }),
  );
  $("rows").replaceChildren(
    ...rows.slice(0, MOST_ROWS_SHOWN).map((row) => {
      const line = element("tr");
      line.append(...columns.map((column) => drawCell(column, row[column])));
      return line;
    }),
  );
  const shown = rows.length > MOST_ROWS_SHOWN ? `The first ${MOST_ROWS_SHOWN} rows; the downloads have all. ` : "";
  $("rows-note").textContent = `${shown}${(totalMs / 1000).toFixed(1)} s in all.`;
  $("result").hidden = true;
  $("table").hidden = false;
  say(`${count(rows.length, "row")} labelled.`, true);
  reveal($("table"));
}

// What a row is about stands next to its label, also on a phone. Errors show up where there are any.
function columnsOf(rows, textColumn) {
  const first = ["row", "label", "score", ...(rows.some((row) => row.error) ? ["error"] : [])];
  const last = ["n_tokens", "truncated"];
  const known = [...first, ...last, "error", "probs", textColumn];
  const names = Object.keys(rows[0] ?? {});
  const kept = names.filter((column) => !known.includes(column));
  return [...first, textColumn, ...kept, ...last].filter((column) => column === "row" || names.includes(column));
}

const isNumber = (column) => ["row", "score", "n_tokens"].includes(column);

function drawCell(column, value) {
  const text = cellText(column, value);
  const cell = element("td", undefined, isNumber(column) ? "number" : text.length > 40 ? "long" : "");
  cell.append(element("span", text));
  return cell;
}

function cellText(column, value) {
  if (value === null || value === undefined) return "";
  if (column === "score") return percent(value);
  if (value === true) return "yes";
  if (value === false) return "no";
  const text = typeof value === "object" ? JSON.stringify(value) : String(value);
  return text.length > MOST_CELL_CHARS ? `${text.slice(0, MOST_CELL_CHARS)} …` : text;
}

function save(kind) {
  const { file } = lastFile;
  run(`Making the ${kind} file …`, async (signal) => {
    const response = await callWithFile(lastFile, TYPES[kind], signal);
    const link = element("a");
    link.href = URL.createObjectURL(await response.blob());
    link.download = `${file.name.replace(/\.[^.]*$/, "")}-labelled.${kind}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    say(`Saved ${link.download}.`);
  });
}

// ---- for programs ----

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curl(type, accept, send, parameters) {
  const url = new URL(invocations(parameters), document.baseURI).href;
  const lines = [`curl ${quote(url)}`, `-H ${quote(`Content-Type: ${type}`)}`, `-H ${quote(`Accept: ${accept}`)}`];
  if (token !== null) lines.push('-H "Authorization: Bearer $BATCHCLF_TOKEN"');
  return [...lines, send].join(" \\\n  ");
}

function showPrograms(answer, command) {
  const json = JSON.stringify(answer, null, 2);
  $("json").textContent =
    json.length > MOST_JSON_CHARS ? `${json.slice(0, MOST_JSON_CHARS)}\n… and more: use the command` : json;
  $("curl").textContent = command;
  $("programs").hidden = false;
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch {
    // no clipboard without HTTPS: leave it selected for the user's own keys
    const field = element("textarea", text);
    field.setAttribute("aria-label", "Copy this text");
    button.after(field);
    field.focus();
    field.select();
    field.addEventListener("blur", () => field.remove());
    say("Press Ctrl + C to copy.");
  }
}

// A link holds the text and what it opens with: #text= the result, #json= the answer as JSON.
function linkTo(view, text) {
  return new URL(`#${view}=${encodeURIComponent(text)}`, location.href).href;
}

function copyLink(view, button) {
  const link = linkTo(view, shown);
  if (link.length > MOST_LINK_CHARS) {
    complain("The text is too long for a link; copy the command instead.");
    return;
  }
  history.replaceState(null, "", link);
  copy(link, button);
}

function openLink() {
  const found = /^#(text|json)=(.*)$/.exec(location.hash);
  if (!found) return;
  let text;
  try {
    text = decodeURIComponent(found[2]);
  } catch {
    return; // cut on its way
  }
  setText(text);
  if (text.trim()) classifyText(found[1] === "json");
}

// ---- the page ----

function countText() {
  const numChars = [...$("text").value].length;
  const short = numChars && numChars < model.short_text_chars;
  $("count").textContent = !numChars
    ? "No text yet."
    : `${count(numChars, "character")}${short ? `; too short to trust below ${model.short_text_chars}` : ""}.`;
}

function setText(text) {
  $("text").value = text;
  countText();
}

async function loadModel() {
  model = await (await call("model")).json();
  const labels = model.labels.length > 12 ? count(model.labels.length, "label") : model.labels.join(", ");
  $("about").textContent =
    `Paste an article, or choose a file of them. The model reads the first ${model.max_length} tokens ` +
    `and says which of these it is: ${labels}.`;
  $("model").textContent = `${model.name} on ${model.device} in ${model.dtype}, batchclf ${model.version}`;
  $("column").value = model.text_columns[0];
  countText();
}

async function loadExamples() {
  const examples = await (await call("examples.json")).json();
  $("examples").replaceChildren(
    ...examples.map(({ title, text }) => {
      const button = element("button", title);
      button.type = "button";
      button.addEventListener("click", () => {
        setText(text);
        classifyText();
      });
      return button;
    }),
  );
}

function start() {
  return run("", async () => {
    await loadModel();
    openLink();
  });
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  classifyText();
});
$("text").addEventListener("input", countText);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    classifyText();
  }
});
$("clear").addEventListener("click", () => {
  asked?.abort();
  setText("");
  hideResults();
  complain("");
  say("");
  history.replaceState(null, "", location.pathname + location.search);
  $("text").focus();
});
$("files").addEventListener("submit", (event) => {
  event.preventDefault();
  classifyFile(current);
});
$("file").addEventListener("change", () => {
  if ($("file").files.length) classifyFile($("file").files[0]);
});
for (const name of ["dragover", "dragleave", "drop"]) {
  window.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) {
      classifyFile(event.dataTransfer.files[0]);
    }
  });
}
$("save-csv").addEventListener("click", () => save("csv"));
$("save-parquet").addEventListener("click", () => save("parquet"));
$("copy-link").addEventListener("click", (event) => copyLink("text", event.target));
$("copy-json-link").addEventListener("click", (event) => copyLink("json", event.target));
for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", () => copy($(button.dataset.of).textContent, button));
}
$("access").addEventListener("submit", async (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  $("access").hidden = true;
  const again = retry;
  retry = null;
  await start();
  if ($("access").hidden) again?.();
});
window.addEventListener("hashchange", openLink);

loadExamples();
start();
