// The pictures and the queue on the page. A job has its place, sized as its picture will be, from
// the moment it is next: preview and picture appear in it and nothing moves.

import { sizeOf } from "./form.js";
import { imageAt, isFinished, isUpFront } from "./jobs.js";
import { make } from "./make.js";

const UNKNOWN_ASPECT = 4 / 3;

export class Gallery {
  /** `actions`: what the buttons do, {open(key), cancel(job), again(job, index), remove(job)}. */
  constructor(jobs, actions) {
    this.jobs = jobs;
    this.actions = actions;
    this.presets = {};
    this.isReady = true;
    this.tiles = new Map(); // "job id/index" → Tile
    this.grid = document.querySelector("#grid");
    this.queue = document.querySelector("#queue");
  }

  /** Every picture that is there, newest first: {key, job, index, picture}. */
  pictures() {
    return this.jobs.list().flatMap((job) =>
      (job.state === "done" ? job.pictures : []).map((picture, index) => ({
        key: `${job.id}/${index}`, job, index, picture,
      })),
    );
  }

  render() {
    const list = this.jobs.list();
    const keys = [];
    for (const job of list) {
      for (let index = 0; index < numTiles(job); index += 1) {
        const key = `${job.id}/${index}`;
        keys.push(key);
        if (!this.tiles.has(key)) this.tiles.set(key, new Tile(this, key, index));
        this.tiles.get(key).update(job);
      }
    }
    const wanted = new Set(keys);
    for (const [key, tile] of this.tiles) {
      if (!wanted.has(key)) {
        leave(tile.element);
        this.tiles.delete(key);
      }
    }
    keys.forEach((key, place) => {
      const { element } = this.tiles.get(key);
      // Moving an element takes its focus and reloads nothing else: only where it must.
      if (this.grid.children[place] !== element) {
        this.grid.insertBefore(element, this.grid.children[place] ?? null);
      }
    });
    this.#renderQueue(list.filter((job) => job.state === "queued" && !isUpFront(job)));
    const isEmpty = this.jobs.isLoaded && keys.length === 0 && !this.jobs.more;
    document.querySelector("#empty").hidden = !isEmpty;
    document.querySelector("#older").hidden = !this.jobs.more;
  }

  progress(job) {
    for (let index = 0; index < numTiles(job); index += 1) {
      this.tiles.get(`${job.id}/${index}`)?.update(job);
    }
  }

  tile(key) {
    return this.tiles.get(key)?.element;
  }

  #renderQueue(waiting) {
    waiting.sort((one, other) => one.position - other.position);
    document.querySelector("#waiting").hidden = waiting.length === 0;
    const rows = new Map([...this.queue.children].map((row) => [row.dataset.job, row]));
    waiting.forEach((job, place) => {
      const row = rows.get(job.id) ?? this.#queueRow(job);
      rows.delete(job.id);
      row.querySelector(".position").textContent = job.position + 1;
      if (this.queue.children[place] !== row) {
        this.queue.insertBefore(row, this.queue.children[place] ?? null);
      }
    });
    for (const row of rows.values()) leave(row);
  }

  #queueRow(job) {
    const row = make("li", {},
      make("span", { className: "position", title: "Place in the queue" }),
      make("span", { className: "prompt", textContent: title(job) }),
      make("span", { className: "facts", textContent: wanted(job, this.presets) }),
      this.cancelButton(job));
    row.dataset.job = job.id;
    return row;
  }

  cancelButton(job) {
    const button = make("button", {
      type: "button", className: "quiet", textContent: "Cancel", ariaLabel: `Cancel: ${title(job)}`,
    });
    button.addEventListener("click", () => this.actions.cancel(job));
    return button;
  }
}

class Tile {
  constructor(gallery, key, index) {
    this.gallery = gallery;
    this.key = key;
    this.index = index;
    this.frame = make("div", { className: "frame" });
    this.prompt = make("p", { className: "prompt" });
    this.facts = make("p", { className: "facts" });
    this.caption = make("div", { className: "caption" }, make("div", {}, this.prompt, this.facts));
    this.element = make("li", { className: "tile" }, this.frame, this.caption);
  }

  update(job) {
    if (this.job !== job || this.kind === undefined) {
      this.job = job;
      const { width, height } = this.picture ?? {};
      this.#shape(width ? width / height : this.#knownAspect() ?? UNKNOWN_ASPECT);
      this.prompt.textContent = title(job);
      this.prompt.title = title(job);
    }
    const kind = isFinished(job) ? job.state : "pending";
    if (kind !== this.kind) {
      this.kind = kind;
      this.element.dataset.kind = kind;
      this.caption.querySelector("button")?.remove();
      BUILD[kind]?.call(this);
    }
    if (kind === "pending") this.#showProgress();
  }

  #knownAspect() {
    return aspect(this.job, this.gallery.presets) ?? this.previewAspect;
  }

  get picture() {
    return this.job.state === "done" ? this.job.pictures[this.index] : undefined;
  }

  #shape(ratio) {
    this.element.style.setProperty("--aspect", Math.min(3, Math.max(1 / 3, ratio)).toFixed(4));
  }

  buildPending() {
    const label = `Drawing: ${title(this.job)}`;
    this.bar = make("progress", { max: 1, ariaLabel: label });
    this.preview = make("img", { className: "preview", alt: "", hidden: true });
    this.preview.addEventListener("load", () => {
      const { naturalWidth: width, naturalHeight: height } = this.preview;
      this.previewAspect = width / height;
      if (!isFinished(this.job)) this.#shape(this.#knownAspect());
    });
    this.frame.replaceChildren(this.preview, this.bar);
    this.caption.append(this.gallery.cancelButton(this.job));
  }

  #showProgress() {
    const { fraction, step, numSteps, previews } = this.gallery.jobs.progress(this.job.id);
    const numImages = this.job.arguments.num_images ?? 1;
    const isRunning = this.job.state === "running";
    const now = imageAt(this.job, fraction);
    const own = Math.min(1, Math.max(0, fraction * numImages - this.index));
    if (isRunning && this.index <= now) this.bar.value = own;
    else this.bar.removeAttribute("value");
    this.element.classList.toggle("idle", !isRunning || this.index > now);
    const preview = previews[this.index];
    if (preview && this.preview.getAttribute("src") !== preview) {
      this.preview.src = preview;
      this.preview.hidden = false;
    }
    if (!isRunning) this.facts.textContent = this.#whyNotYet();
    else if (this.index !== now) this.facts.textContent = this.index < now ? "Drawn" : "Waiting";
    else this.facts.textContent = step ? `Step ${step} of ${numSteps}` : "Reading the prompt";
  }

  #whyNotYet() {
    if (!this.gallery.isReady) return "Waiting for the model";
    const others = this.gallery.jobs.list().some((job) => job.state === "running");
    return others ? "Next" : "Starting";
  }

  buildDone() {
    const { job, picture } = this;
    const image = make("img", {
      className: "picture", alt: "", loading: "lazy", decoding: "async",
      width: picture.width, height: picture.height,
    });
    const open = make("button", { type: "button", className: "open" }, image);
    open.append(make("span", { className: "sr", textContent: `Open picture: ${title(job)}` }));
    open.addEventListener("click", () => this.gallery.actions.open(this.key));
    image.addEventListener("load", () => {
      image.classList.add("loaded");
      this.element.classList.add("loaded");
    });
    image.addEventListener("error", () => {
      this.facts.textContent = "Its file is gone";
    });
    image.src = picture.url;
    this.bar?.remove();
    this.frame.append(open);
    if (!this.preview) this.frame.replaceChildren(open);
    this.facts.textContent = job.has_nsfw_concepts?.[this.index]
      ? "Blacked out by the safety checker"
      : drawn(job, this.index);
  }

  buildFailed() {
    const { actions } = this.gallery;
    const again = make("button", { type: "button", textContent: "Try again" });
    const dismiss = make("button", { type: "button", className: "quiet", textContent: "Dismiss" });
    again.addEventListener("click", () => actions.again(this.job, 0));
    dismiss.addEventListener("click", () => actions.remove(this.job));
    this.frame.replaceChildren(
      make("div", { className: "failed" },
        make("p", { className: "reason", textContent: reason(this.job) }),
        make("div", { className: "row" }, again, dismiss)));
    this.facts.textContent = "Not drawn";
  }
}

const BUILD = {
  pending: Tile.prototype.buildPending,
  done: Tile.prototype.buildDone,
  failed: Tile.prototype.buildFailed,
};

export function title(job) {
  return String(job.arguments.prompt ?? "").trim() || "(no prompt)";
}

export function reason(job) {
  return job.failure || "It failed; the server's log says why.";
}

/** The seed of a picture: the images of a job have seed, seed + 1, … */
export function seedOf(job, index) {
  const seed = job.seed ?? job.arguments.seed;
  return seed === null || seed === undefined ? "" : String(BigInt(seed) + BigInt(index));
}

function numTiles(job) {
  if (job.state === "done") return job.pictures.length;
  if (job.state === "failed") return 1;
  return isUpFront(job) ? job.arguments.num_images ?? 1 : 0;
}

const inSteps = (steps) => (steps === 1 ? "1 step" : `${steps} steps`);

function drawn(job, index) {
  const seed = seedOf(job, index);
  const steps = job.arguments.num_inference_steps;
  return [seed && `seed ${seed}`, steps && inSteps(steps)].filter(Boolean).join(" · ");
}

function wanted(job, presets) {
  const size = sizeOf(job.arguments.image_size, presets);
  const { num_inference_steps: steps, num_images: images } = job.arguments;
  return [
    size && size.join(" × "), steps && inSteps(steps), images > 1 && `${images} images`,
  ].filter(Boolean).join(" · ");
}

const inputKey = (job) => `krea-local-input-${job.id}`;

/** Remember a job's input image, which decides its shape and which the server's list leaves out. */
export function rememberInput(job, input) {
  sessionStorage.setItem(inputKey(job), JSON.stringify(input));
}

/** A job's input image: {url}, with width and height if this tab submitted it; null if none. */
export function inputOf(job) {
  const remembered = JSON.parse(sessionStorage.getItem(inputKey(job)));
  if (remembered) return remembered;
  const url = job.arguments.image_url ?? "";
  return /^\/files\/[\w-]+$/.test(url) ? { url } : null;
}

/** Width over height that a job's pictures will have, or null if that is not known yet. */
function aspect(job, presets) {
  const size = sizeOf(job.arguments.image_size, presets);
  if (size) return size[0] / size[1];
  const input = inputOf(job);
  return input?.width ? input.width / input.height : null;
}

/** Take an element away; if it had the focus, its neighbour gets it. */
function leave(element) {
  const hadFocus = element.contains(document.activeElement);
  const neighbour = element.nextElementSibling ?? element.previousElementSibling;
  element.remove();
  if (hadFocus) (neighbour?.querySelector("button") ?? document.querySelector("#prompt")).focus();
}
