// One picture, large, with its recipe and what can be done with it.

import { seedOf, title } from "./gallery.js";
import { inWords } from "./form.js";
import { make } from "./make.js";

const ask = (id) => document.querySelector(`#${id}`);

export class Viewer {
  /** `actions`: {again(job, index), use(picture), copy(text), remove(job), failed(error)}. */
  constructor(gallery, jobs, actions) {
    this.gallery = gallery;
    this.jobs = jobs;
    this.actions = actions;
    this.dialog = ask("viewer");
    this.image = ask("viewer-picture");
    ask("close").addEventListener("click", () => this.dialog.close());
    ask("previous").addEventListener("click", () => this.move(-1));
    ask("next").addEventListener("click", () => this.move(1));
    ask("again").addEventListener("click", () => this.#leaveFor("again"));
    ask("use").addEventListener("click", () => this.#leaveFor("use"));
    ask("copy").addEventListener("click", () => actions.copy(this.now.job.arguments.prompt ?? ""));
    ask("delete").addEventListener("click", () => this.#remove());
    ask("delete").addEventListener("blur", () => this.#disarm());
    this.dialog.addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
      if (event.key === "ArrowLeft") this.move(-1);
      if (event.key === "ArrowRight") this.move(1);
    });
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // beside the box
    });
    this.dialog.addEventListener("close", () => {
      this.image.removeAttribute("src");
      if (!this.isLeaving) this.gallery.tile(this.key)?.querySelector("button")?.focus();
      this.isLeaving = false;
    });
  }

  open(key) {
    this.#show(key);
    this.dialog.showModal();
    this.dialog.scrollTop = 0;
    ask("close").focus();
  }

  async move(by) {
    const pictures = this.gallery.pictures();
    const to = pictures.findIndex((one) => one.key === this.key) + by;
    if (to >= 0 && to < pictures.length) this.#show(pictures[to].key);
    else if (to >= pictures.length && this.jobs.more) {
      try {
        await this.jobs.older();
      } catch (error) {
        this.actions.failed(error);
        return;
      }
      if (this.gallery.pictures().length > pictures.length) await this.move(by);
    }
  }

  /** The list changed: the picture shown may be gone, its neighbours may be others. */
  update() {
    if (!this.dialog.open) return;
    if (this.gallery.pictures().some((one) => one.key === this.key)) this.#showEnds();
    else this.dialog.close();
  }

  #show(key) {
    this.key = key;
    this.now = this.gallery.pictures().find((one) => one.key === key);
    const { job, index, picture } = this.now;
    this.image.width = picture.width;
    this.image.height = picture.height;
    this.image.alt = title(job);
    this.image.src = picture.url;
    ask("words").textContent = title(job);
    const link = ask("download");
    link.href = picture.url;
    link.download = fileName(job, index, picture);
    const rows = recipe(job, index, picture);
    ask("recipe").replaceChildren(
      ...rows.flatMap(([name, value]) => [
        make("dt", { textContent: name }),
        make("dd", { textContent: value }),
      ]),
    );
    const notices = [...(job.notices ?? [])];
    if (job.has_nsfw_concepts?.[index]) notices.unshift("Blacked out by the safety checker.");
    ask("notices").hidden = notices.length === 0;
    ask("notices").replaceChildren(...notices.map((text) => make("li", { textContent: text })));
    this.#disarm();
    this.#showEnds();
  }

  #showEnds() {
    const pictures = this.gallery.pictures();
    const place = pictures.findIndex((one) => one.key === this.key);
    ask("previous").disabled = place === 0;
    ask("next").disabled = place === pictures.length - 1 && !this.jobs.more;
  }

  #leaveFor(action) {
    const { job, index, picture } = this.now;
    this.isLeaving = true;
    this.dialog.close();
    if (action === "again") this.actions.again(job, index);
    else this.actions.use(picture);
  }

  // Deleting cannot be undone, so the button asks once more in its own place.
  async #remove() {
    const { job, index } = this.now;
    const button = ask("delete");
    if (!button.classList.contains("armed")) {
      button.classList.add("armed");
      button.textContent = job.pictures.length > 1
        ? `Delete all ${job.pictures.length} of this drawing?` : "Delete for good?";
      return;
    }
    const pictures = this.gallery.pictures().filter((one) => one.job.id !== job.id);
    const place = this.gallery.pictures().findIndex((one) => one.job.id === job.id);
    const neighbour = pictures[Math.min(place, pictures.length - 1)];
    if (await this.actions.remove(job)) {
      if (neighbour && !this.dialog.open) this.open(neighbour.key);
    } else {
      this.#show(`${job.id}/${index}`);
    }
  }

  #disarm() {
    ask("delete").classList.remove("armed");
    ask("delete").textContent = "Delete";
  }
}

/** What made a picture, as [name, value] in words. */
function recipe(job, index, picture) {
  const rows = [["Size", `${picture.width} × ${picture.height}`], ["Seed", seedOf(job, index)]];
  const elsewhere = ["prompt", "seed", "image_size", "num_images", "sync_mode", "image_url"];
  for (const [name, value] of Object.entries(job.arguments)) {
    if (elsewhere.includes(name) || isNothing(value)) continue;
    rows.push([inWords(name), inText(value)]);
  }
  if (job.pictures.length > 1) rows.push(["Image", `${index + 1} of ${job.pictures.length}`]);
  if (job.arguments.image_url) rows.push(["Input image", shortened(job.arguments.image_url)]);
  const seconds = job.timings?.total ?? job.timings?.inference;
  if (seconds !== undefined) rows.push(["Took", `${seconds.toFixed(1)} s`]);
  const when = new Date((job.finished ?? job.created) * 1000);
  rows.push(["Drawn", when.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" })]);
  rows.push(["Endpoint", job.endpoint]);
  return rows;
}

const isNothing = (value) =>
  value === null || value === undefined || (Array.isArray(value) && value.length === 0);

function inText(value) {
  if (typeof value === "boolean") return value ? "on" : "off";
  if (typeof value === "object") return JSON.stringify(value);
  return String(value);
}

function shortened(url) {
  const text = String(url);
  return text.length > 60 ? `${text.slice(0, 57)}…` : text;
}

function fileName(job, index, picture) {
  const words = title(job).toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 48);
  const stem = words.replace(/^-+|-+$/g, "") || "picture";
  const extension = picture.content_type?.split("/")[1] ?? "jpeg";
  return `${stem}-${seedOf(job, index)}.${extension}`;
}

