// The page at `/`: ties the form, the jobs, the pictures and the server's state together.

import * as api from "./api.js";
import { Fields } from "./form.js";
import { Gallery, inputOf, reason, rememberInput, seedOf } from "./gallery.js";
import { isFinished, Jobs } from "./jobs.js";
import { make, say } from "./make.js";
import { Viewer } from "./viewer.js";

const BUSY_MS = 1500; // between looks at the server while something is drawn
const IDLE_MS = 4000;
const LOST_MS = [1000, 2000, 4000, 8000]; // while it does not answer
const TOAST_MS = 4000;
const DRAFT = "krea-local-draft";
const NAME = document.title;

const ask = (id) => document.querySelector(`#${id}`);
const prompt = ask("prompt");
const jobs = new Jobs();
const gallery = new Gallery(jobs, { open: (key) => viewer.open(key), cancel, again, remove });
const viewer = new Viewer(gallery, jobs, {
  again, use, copy, remove, failed: (error) => toast(error.message),
});

let schema = null;
let fields = null;
let endpoints = []; // that the server draws with now
let input = null; // the input image: {url, width, height}
let state = null;

// --- the form ---

/** The endpoint for what is in the form: one that takes an image if there is one. */
function endpoint() {
  const takesImage = (id) => schema.endpoints[id].fields.some(({ name }) => name === "image_url");
  return endpoints.find((id) => takesImage(id) === Boolean(input)) ?? endpoints[0];
}

function showFields() {
  if (!schema || !endpoints.length) return;
  if (fields.endpoint !== endpoint()) fields.show(endpoint());
  const takesImages = endpoints.some((id) =>
    schema.endpoints[id].fields.some(({ name }) => name === "image_url"));
  ask("drop").parentElement.hidden = !takesImages;
}

function keepDraft() {
  const draft = { prompt: prompt.value, chosen: fields?.chosen ?? {}, input };
  sessionStorage.setItem(DRAFT, JSON.stringify(draft));
}

function takeDraft() {
  const draft = JSON.parse(sessionStorage.getItem(DRAFT) ?? "{}");
  if (!prompt.value) prompt.value = draft.prompt ?? "";
  fields.chosen = draft.chosen ?? {};
  if (draft.input) showInput(draft.input);
  ask("more").open = fields.hasHiddenChoice;
}

async function draw() {
  if (ask("draw").ariaBusy === "true") return;
  clearErrors();
  if (!fields?.endpoint) {
    say(ask("form-error"), "The server has not answered yet.");
    return;
  }
  const values = { prompt: prompt.value, ...fields.values() };
  if (input) values.image_url = input.url;
  ask("draw").ariaBusy = "true";
  try {
    const submitted = input;
    const job = await jobs.submit(fields.endpoint, values);
    if (submitted) {
      rememberInput(job, submitted);
      gallery.render();
    }
    announce("Submitted.");
    bringIntoView(gallery.tile(`${job.id}/0`));
    look();
  } catch (error) {
    showError(error);
  } finally {
    ask("draw").ariaBusy = "false";
  }
}

function bringIntoView(tile) {
  if (!tile) return;
  const box = tile.getBoundingClientRect();
  if (box.top >= 0 && box.top + 120 < innerHeight) return;
  const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
  tile.scrollIntoView({ block: "nearest", behavior: isStill ? "auto" : "smooth" });
}

function clearErrors() {
  for (const error of ask("composer").querySelectorAll(".error")) say(error, "");
  for (const control of ask("composer").querySelectorAll("[aria-invalid]")) {
    control.removeAttribute("aria-invalid");
  }
}

/** Put each fault beside its field, what belongs to none under the form, and go to the first. */
function showError(error) {
  const faults = error instanceof api.ApiError ? error.faults : [];
  const others = faults.length ? [] : [error.message];
  let first = null;
  for (const fault of faults) {
    const [, name, ...inner] = fault.loc ?? [];
    const row = ask("composer").querySelector(`[data-field="${CSS.escape(name ?? "")}"]`);
    const text = [...inner, fault.msg.replace("Value error, ", "").replace(/^Input should/, "Should")].join(": ");
    if (!row || row.hidden) {
      others.push(name ? `${name}: ${text}` : text);
      continue;
    }
    const place = row.querySelector(".error");
    say(place, place.textContent ? `${place.textContent}; ${text}` : text);
    const controls = [...row.querySelectorAll("input, textarea")];
    controls.forEach((control) => control.setAttribute("aria-invalid", "true"));
    if (ask("more").contains(row)) ask("more").open = true;
    first ??= controls.find((control) => control.type !== "radio" || control.checked);
  }
  say(ask("form-error"), others.join("; "));
  first?.focus(); // which reads its error aloud too
}

// --- the input image ---

async function takeImage(blob) {
  say(ask("image-error"), "");
  if (!blob.type.startsWith("image/")) {
    say(ask("image-error"), "That is not an image: PNG, JPEG or WebP, please.");
    return;
  }
  ask("drop").ariaBusy = "true";
  try {
    const { url, width, height } = await api.upload(blob);
    showInput({ url, width, height });
    announce("Input image added.");
    keepDraft();
  } catch (error) {
    say(ask("image-error"), error.message);
  } finally {
    ask("drop").ariaBusy = "false";
    ask("picker").value = "";
  }
}

function showInput(image) {
  input = image;
  ask("input").hidden = !image;
  ask("drop").classList.toggle("full", Boolean(image));
  if (image) {
    const picture = ask("input-picture");
    picture.onerror = () => {
      removeInput();
      say(ask("image-error"), "That image is no longer on the server: add it again.");
    };
    picture.onload = () => {
      image.width ??= picture.naturalWidth;
      image.height ??= picture.naturalHeight;
      ask("input-size").textContent = `${image.width} × ${image.height}`;
    };
    picture.src = image.url;
  }
  showFields();
}

function removeInput() {
  showInput(null);
  keepDraft();
}

// --- what can be done with jobs and pictures ---

async function cancel(job) {
  try {
    await jobs.cancel(job.id);
    toast("Cancelled");
  } catch (error) {
    toast(error.message);
  }
}

async function remove(job) {
  try {
    await jobs.remove(job.id);
    toast("Deleted");
    return true;
  } catch (error) {
    toast(error.message);
    return false;
  }
}

/** Put a job's recipe back into the form, with the seed of one of its pictures. */
async function again(job, index) {
  const { prompt: words, image_url: url, ...values } = job.arguments;
  const seed = seedOf(job, index);
  if (seed) values.seed = Number.isSafeInteger(Number(seed)) ? Number(seed) : seed;
  if (job.state === "done") delete values.num_images;
  clearErrors();
  prompt.value = words ?? "";
  const image = inputOf(job);
  showInput(image);
  if (url && !image) say(ask("image-error"), "This picture had an input image: add it again.");
  fields.fill(values);
  ask("more").open ||= fields.hasHiddenChoice;
  keepDraft();
  prompt.scrollIntoView({ block: "nearest" });
  prompt.focus();
  toast("Its recipe is in the form");
}

async function use(picture) {
  try {
    await takeImage(await api.download(picture.url));
    prompt.scrollIntoView({ block: "nearest" });
    prompt.focus();
  } catch (error) {
    toast(error.message);
  }
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast("Prompt copied");
  } catch {
    toast("This browser does not let the page copy: select the prompt instead");
  }
}

// --- what is said ---

let toastTimer = 0;

/** Say something in passing; inside an open dialog, for the rest of the page is inert then. */
function toast(text) {
  const element = ask("toast");
  (document.querySelector("dialog[open]") ?? document.body).append(element);
  clearTimeout(toastTimer);
  requestAnimationFrame(() => {
    element.textContent = text;
    element.classList.add("shown");
  });
  toastTimer = setTimeout(() => element.classList.remove("shown"), TOAST_MS);
}

/** Say something to those who listen to the page. */
function announce(text) {
  ask("live").textContent = text;
}

function showTitle() {
  const running = jobs.list().findLast((job) => job.state === "running");
  const { fraction } = running ? jobs.progress(running.id) : { fraction: 0 };
  document.title = running ? `${Math.round(fraction * 100)} % · ${NAME}` : NAME;
}

// --- the server's state ---

const WORKER = { loading: "loading", idle: "idle", busy: "drawing", failed: "failed", stopped: "stopped" };

function showState() {
  const failed = state.workers.find((worker) => worker.state === "failed");
  const mood = state.ready ? "ready" : failed ? "failed" : "loading";
  ask("dot").dataset.state = mood;
  const why = failed?.reason ? `: ${failed.reason}` : "";
  const name = state.workers.find((worker) => worker.model)?.model ?? state.model;
  ask("model").textContent = {
    ready: `${name} is ready`,
    loading: `${name} is loading`,
    failed: `${name} could not be loaded${why}`,
  }[mood];
  ask("status").title = `krea_local ${state.version ?? ""}`.trim();
  ask("queued").textContent = state.queue_length ? `${state.queue_length} waiting` : "";
  ask("workers").replaceChildren(...state.workers.map(worker));
  gallery.isReady = state.ready;
}

function worker({ device, state: now, memory_used: used, memory_total: total, reason: why }) {
  const text = total
    ? `${device} ${gigabytes(used)} of ${gigabytes(total)} GB`
    : `${device} ${WORKER[now] ?? now}`;
  const element = make("span", { className: "worker", title: why || WORKER[now] || now });
  if (total) {
    element.append(make("meter", {
      max: total, value: used, ariaLabel: `GPU memory of ${device}`,
    }));
  }
  element.append(text);
  return element;
}

const gigabytes = (bytes) => (bytes / 1e9).toFixed(bytes < 10e9 ? 1 : 0);

let timer = 0;
let numLost = 0;
let isLooking = false;

/** Look at the server's state and newest jobs, and again after a while. */
async function look() {
  clearTimeout(timer);
  if (isLooking) return;
  isLooking = true;
  let pause = IDLE_MS;
  try {
    if (!schema) await loadSchema();
    state = await api.get("api/state");
    endpoints = state.endpoints.filter((id) => id in schema.endpoints);
    if (!endpoints.length) endpoints = Object.keys(schema.endpoints);
    showFields();
    showState();
    await jobs.refresh(state.workers.map((one) => one.job));
    if (numLost) toast("Connected again");
    numLost = 0;
    say(ask("banner"), "");
    pause = jobs.list().some((job) => !isFinished(job)) || !state.ready ? BUSY_MS : IDLE_MS;
  } catch (error) {
    pause = LOST_MS[Math.min(numLost, LOST_MS.length - 1)];
    numLost += 1;
    ask("dot").dataset.state = "failed";
    say(ask("banner"), error instanceof api.Unreachable
      ? "The connection to the server is lost. Trying again …"
      : `The server has a problem: ${error.message}`);
  }
  isLooking = false;
  timer = setTimeout(look, document.hidden ? pause * 4 : pause);
}

async function loadSchema() {
  const loaded = await api.get("api/schema");
  gallery.presets = loaded.presets;
  fields = new Fields(loaded.endpoints, loaded.presets, ask("fields"), ask("more-fields"));
  fields.onChange = keepDraft;
  schema = loaded;
  takeDraft();
}

// --- the key ---

function askForKey(wasWrong) {
  return new Promise((resolve) => {
    const dialog = ask("key-dialog");
    say(ask("key-error"), wasWrong ? "That is not the key." : "");
    ask("key").value = "";
    ask("key-form").onsubmit = (event) => {
      event.preventDefault();
      // No server takes others, and fetch cannot send them.
      if (/^[!-~]+$/.test(ask("key").value.trim())) dialog.close();
      else say(ask("key-error"), "That is not the key.");
    };
    dialog.oncancel = () => {
      ask("key").value = "";
    };
    dialog.onclose = () => {
      const key = ask("key").value.trim();
      if (key) resolve(key);
      else dialog.showModal(); // nothing works without it
    };
    dialog.showModal();
    ask("key").focus();
  });
}

// --- all begins ---

jobs.addEventListener("change", () => {
  gallery.render();
  viewer.update();
  showTitle();
});
jobs.addEventListener("progress", ({ detail: job }) => {
  gallery.progress(job);
  showTitle();
});
jobs.addEventListener("finished", ({ detail: job }) => {
  if (job.state === "done") announce(`Drawn: ${job.pictures.length === 1 ? "one picture" : `${job.pictures.length} pictures`}.`);
  if (job.state === "failed") announce(`Not drawn: ${reason(job)}`);
});

ask("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
document.addEventListener("keydown", (event) => {
  const isDraw = event.key === "Enter" && (event.ctrlKey || event.metaKey);
  if (!isDraw || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  draw();
});
prompt.addEventListener("input", () => {
  say(ask("prompt-error"), "");
  prompt.removeAttribute("aria-invalid");
  keepDraft();
});
ask("reset").addEventListener("click", () => {
  clearErrors();
  fields?.fill({});
  toast("All settings are at their defaults");
});
ask("older").addEventListener("click", () => jobs.older().catch((error) => toast(error.message)));
ask("picker").addEventListener("change", () => {
  if (ask("picker").files.length) takeImage(ask("picker").files[0]);
});
ask("input-remove").addEventListener("click", () => {
  removeInput();
  ask("picker").focus();
});
document.addEventListener("paste", (event) => {
  const image = [...event.clipboardData.files].find((file) => file.type.startsWith("image/"));
  if (!image || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  takeImage(image);
});
// The whole window takes a dropped image; without this, a near miss would leave the page for it.
for (const type of ["dragover", "drop", "dragleave"]) {
  document.addEventListener(type, (event) => {
    const isFile = event.dataTransfer?.types.includes("Files");
    if (!isFile) return;
    event.preventDefault();
    ask("drop").classList.toggle("over", type === "dragover");
    if (type === "drop" && event.dataTransfer.files.length) takeImage(event.dataTransfer.files[0]);
  });
}
document.addEventListener("visibilitychange", () => {
  jobs.watch();
  if (!document.hidden) look();
});
addEventListener("online", look);
if (/Mac|iP/.test(navigator.platform)) ask("shortcut").textContent = "⌘ ↵";
api.onKeyWanted(askForKey);
look();
