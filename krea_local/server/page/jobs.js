// The jobs that this page knows of, kept up to date: pages of the server's list, newest first, and
// the event streams of those that are being drawn. Knows nothing of how they are shown.

import * as api from "./api.js";

export const PAGE = 24;
const OLDEST = 8; // unfinished jobs before the newest page that are looked at too: the next to end
// A browser has six HTTP/1.1 connections to a server, for all its tabs together.
const STREAMS = 2;
const STREAMS_WHILE_HIDDEN = 1; // the tab's title tells how far it is
const RETRY_MS = 1000;

export const isFinished = (job) => ["done", "failed", "cancelled"].includes(job.state);

/** Drawn now, or next: those have a place among the pictures; others wait in the queue. */
export const isUpFront = (job) =>
  job.state === "running" || (job.state === "queued" && !job.position);

export class Jobs extends EventTarget {
  #jobs = new Map();
  #deleted = new Set();
  #streams = new Map(); // job id → AbortController
  #progress = new Map(); // job id → {fraction, step, numSteps, previews}
  #oldest = 0; // when the oldest of those was created that are here without a gap
  more = false; // whether the server has older ones
  isLoaded = false;

  /** All, newest first. */
  list() {
    return [...this.#jobs.values()].sort((one, other) => other.created - one.created);
  }

  get(id) {
    return this.#jobs.get(id);
  }

  /** How far a job is: {fraction, step, numSteps, previews: [data URI of each image]}. */
  progress(id) {
    return this.#progress.get(id) ?? { fraction: 0, step: 0, numSteps: 0, previews: [] };
  }

  /** Look at the newest page, and at what is unfinished before it, such as `working`, the jobs that
   * workers are at. */
  async refresh(working = []) {
    const before = new Map(this.#jobs);
    const page = await api.get(`api/jobs?limit=${PAGE}`);
    const ids = new Set(page.jobs.map((job) => job.id));
    const oldest = page.jobs.at(-1)?.created ?? 0;
    const isGap = page.more && before.size > 0 && !page.jobs.some((job) => before.has(job.id));
    for (const [id, job] of before) {
      const shouldBeThere = !page.more || job.created > oldest;
      const isLeft = isGap ? isFinished(job) : shouldBeThere;
      if (isLeft && !ids.has(id)) this.#jobs.delete(id);
    }
    if (isGap || !this.isLoaded || !page.more) {
      this.more = page.more;
      this.#oldest = oldest;
    }
    page.jobs.forEach((job) => this.#take(job));
    const unfinished = this.list().filter((job) => !isFinished(job) && !ids.has(job.id));
    const others = new Set([...working, ...unfinished.slice(-OLDEST).map((job) => job.id)]);
    for (const id of others) {
      if (id && !ids.has(id) && !this.#deleted.has(id)) await this.#look(id);
    }
    this.isLoaded = true;
    this.#changed();
  }

  async #look(id) {
    try {
      this.#take(await api.get(`api/jobs/${id}`));
    } catch (error) {
      if (!(error instanceof api.ApiError && error.status === 404)) throw error;
      this.#jobs.delete(id);
    }
  }

  async older() {
    const last = this.list().findLast((job) => job.created >= this.#oldest);
    const page = await api.get(`api/jobs?limit=${PAGE}${last ? `&before=${last.id}` : ""}`);
    this.more = page.more;
    this.#oldest = page.jobs.at(-1)?.created ?? this.#oldest;
    page.jobs.forEach((job) => this.#take(job));
    this.#changed();
  }

  async submit(endpoint, values) {
    const job = await api.post("api/jobs", { endpoint, arguments: values });
    this.#take(job);
    this.#changed();
    return job;
  }

  async cancel(id) {
    await api.post(`api/jobs/${id}/cancel`);
    const job = this.#jobs.get(id);
    // A running one stops within a step, and its stream tells when.
    if (job?.state === "queued") this.#take({ ...job, state: "cancelled" });
    this.#changed();
  }

  async remove(id) {
    await api.remove(`api/jobs/${id}`);
    this.#deleted.add(id);
    this.#jobs.delete(id);
    this.#changed();
  }

  #take(job) {
    const known = this.#jobs.get(job.id);
    if (this.#deleted.has(job.id)) return;
    if (known && isFinished(known) && !isFinished(job)) return; // an answer that was overtaken
    this.#jobs.set(job.id, job);
    if (known && !isFinished(known) && isFinished(job)) {
      this.dispatchEvent(new CustomEvent("finished", { detail: job }));
    }
  }

  #changed() {
    this.watch();
    this.dispatchEvent(new Event("change"));
  }

  /** Follow what is drawn now, or else what is next; the rest is seen when the list is. */
  watch() {
    const upFront = this.list().filter(isUpFront);
    const running = upFront.filter((job) => job.state === "running");
    const numStreams = document.hidden ? STREAMS_WHILE_HIDDEN : STREAMS;
    const wanted = (running.length ? running : upFront).slice(-numStreams);
    for (const { id } of wanted) if (!this.#streams.has(id)) this.#follow(id);
    for (const [id, stream] of this.#streams) {
      if (!wanted.some((job) => job.id === id)) stream.abort();
    }
  }

  async #follow(id) {
    const stream = new AbortController();
    this.#streams.set(id, stream);
    try {
      await api.follow(`api/jobs/${id}/events`, stream.signal, (type, data) =>
        this.#happened(id, type, data),
      );
    } catch (error) {
      if (error instanceof api.ApiError && error.status === 404) this.#jobs.delete(id);
      // Anything else is a lost connection: the next look at the list starts the stream again.
    }
    await new Promise((resolve) => setTimeout(resolve, stream.signal.aborted ? 0 : RETRY_MS));
    this.#streams.delete(id);
    if (!stream.signal.aborted) this.#changed();
  }

  #happened(id, type, data) {
    const known = this.#jobs.get(id);
    if (!known) return;
    if (type === "progress") {
      const before = this.progress(id);
      const previews = [...before.previews];
      if (data.preview) previews[imageAt(known, data.fraction)] = data.preview;
      const { fraction, step, num_steps: numSteps } = data;
      this.#progress.set(id, { fraction, step, numSteps, previews });
    }
    const job = { ...known, ...data.job, position: data.position ?? data.job?.position };
    const isNews = job.state !== known.state || job.position !== known.position;
    this.#take(job);
    if (isNews) this.#changed();
    else if (type === "progress") {
      this.dispatchEvent(new CustomEvent("progress", { detail: job }));
    }
  }
}

/** Which image of a job is being drawn: they are drawn one after another. */
export function imageAt(job, fraction) {
  const numImages = job.arguments.num_images ?? 1;
  return Math.min(numImages - 1, Math.floor(fraction * numImages));
}
