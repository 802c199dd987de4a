// The fields of the form, made from the server's schema: bounds, defaults and help are its own.

import { make } from "./make.js";

// The few that most pictures want; all others wait under "More settings". Only their order and
// place is decided here.
const FIRST = ["image_size", "strength", "num_images", "seed"];
// Two stand in the page itself; how JSON carries pictures makes no difference here.
const ELSEWHERE = ["prompt", "image_url", "sync_mode"];
const CHOICES_IN_A_ROW = 4;
const STEPS_OF_A_SLIDER = 1000;

export class Fields {
  /** `endpoints`: of /api/schema, `presets`: {name: [width, height]}. */
  constructor(endpoints, presets, first, more) {
    this.endpoints = endpoints;
    this.presets = presets;
    this.first = first;
    this.more = more;
    this.controls = new Map();
    this.chosen = {}; // what differs from the defaults, by the user's hand
    this.onChange = () => {};
  }

  /** Show the fields of an endpoint; values that the user chose stay where they still fit. */
  show(endpoint) {
    this.endpoint = endpoint;
    this.controls.clear();
    this.first.replaceChildren();
    this.more.replaceChildren();
    const fields = this.endpoints[endpoint].fields.filter(
      (field) => !ELSEWHERE.includes(field.name) && field.type in BUILDERS,
    );
    const rank = (field) => (FIRST.includes(field.name) ? FIRST.indexOf(field.name) : FIRST.length);
    for (const field of [...fields].sort((one, other) => rank(one) - rank(other))) {
      const control = BUILDERS[field.type](field, this.presets);
      const row = frame(field, control);
      row.addEventListener("input", () => this.#changed(field, control));
      (FIRST.includes(field.name) ? this.first : this.more).append(row);
      const value = this.chosen[field.name];
      control.set(value !== undefined && fits(value, field) ? value : field.default);
      this.controls.set(field.name, { ...control, field, row });
    }
  }

  #changed(field, control) {
    const value = control.get();
    if (value === undefined || same(value, field.default)) delete this.chosen[field.name];
    else this.chosen[field.name] = value;
    this.onChange();
  }

  /** Every field's value by name; those left empty are not there, and get the server's default. */
  values() {
    const values = {};
    for (const [name, control] of this.controls) {
      const value = control.get();
      if (value !== undefined && value !== null) values[name] = value;
    }
    return values;
  }

  /** Take values, of a job's recipe for instance; all others go back to their defaults. */
  fill(values) {
    this.chosen = {};
    for (const { field } of this.controls.values()) {
      const value = values[field.name];
      const isGiven = value !== undefined && value !== null && !same(value, field.default);
      if (isGiven) this.chosen[field.name] = value;
    }
    this.show(this.endpoint);
    this.onChange();
  }

  /** Whether a field that waits under "More settings" has been chosen. */
  get hasHiddenChoice() {
    return Object.keys(this.chosen).some((name) => !FIRST.includes(name));
  }

  /** [width, height] of the picture asked for, or null if an input image decides. */
  size() {
    const control = this.controls.get("image_size");
    return control ? sizeOf(control.get(), this.presets) : null;
  }

  /** The row of a field, for its error. */
  row(name) {
    return this.controls.get(name)?.row;
  }
}

/** [width, height] of an `image_size`, or null if it is none. */
export function sizeOf(value, presets) {
  if (typeof value === "string") return presets[value] ?? null;
  return value?.width > 0 && value?.height > 0 ? [value.width, value.height] : null;
}

/** "num_inference_steps" → "Number of inference steps", "landscape_4_3" → "Landscape 4:3". */
export function inWords(name) {
  const words = name
    .replace(/^num_/, "number_of_")
    .replace(/^enable_/, "")
    .replace(/(\d+)_(\d+)$/, "$1:$2")
    .replace(/_hd$/, "_HD")
    .replaceAll("_", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}

// What was chosen for one endpoint may be out of another's bounds.
function fits(value, { type, minimum, maximum }) {
  if (type !== "integer" && type !== "number") return true;
  return !(Number(value) < (minimum ?? -Infinity) || Number(value) > (maximum ?? Infinity));
}

function same(one, other) {
  return JSON.stringify(one) === JSON.stringify(other);
}

function frame(field, control) {
  const id = `field-${field.name}`;
  const help = make("p", { className: "help", id: `${id}-help`, textContent: field.description });
  const error = make("p", { className: "error", id: `${id}-error`, hidden: true });
  const named = control.isGroup
    ? make("legend", { textContent: inWords(field.name) })
    : make("label", { htmlFor: id, textContent: inWords(field.name) });
  const row = make(control.isGroup ? "fieldset" : "div", { className: "field" });
  row.dataset.field = field.name;
  row.dataset.kind = control.kind ?? field.type;
  for (const input of control.inputs) {
    input.setAttribute("aria-describedby", `${help.id} ${error.id}`);
  }
  if (!control.isGroup) control.inputs[0].id = id;
  row.append(named, control.element, help, error);
  return row;
}

const BUILDERS = {
  string: (field) => line(field, "text", (text) => text),
  integer: (field) => number(field),
  number: (field) => number(field),
  boolean: toggle,
  enum: (field) => choice(field),
  size,
};

function line(field, type, read) {
  const input = make("input", { type, autocomplete: "off", spellcheck: false });
  return {
    element: input,
    inputs: [input],
    get: () => (input.value.trim() === "" ? undefined : read(input.value.trim())),
    set: (value) => {
      input.value = value ?? "";
    },
  };
}

function number(field) {
  const { minimum, maximum } = field;
  const isBounded = typeof minimum === "number" && typeof maximum === "number";
  const step = field.type === "integer" ? 1 : maximum - minimum <= 2 ? 0.01 : 0.1;
  if (!isBounded || (maximum - minimum) / step > STEPS_OF_A_SLIDER) return anyNumber(field);
  const numChoices = maximum - minimum + 1;
  if (field.type === "integer" && numChoices <= CHOICES_IN_A_ROW) {
    const choices = Array.from({ length: numChoices }, (_, i) => minimum + i);
    return choice({ ...field, choices });
  }
  const input = make("input", {
    type: "number", min: minimum, max: maximum, step, autocomplete: "off",
    placeholder: field.default ?? "",
  });
  const slider = make("input", {
    type: "range", min: minimum, max: maximum, step, ariaLabel: inWords(field.name),
  });
  slider.addEventListener("input", () => {
    input.value = slider.value;
  });
  input.addEventListener("input", () => {
    slider.value = input.value === "" ? field.default : input.value;
  });
  return {
    kind: "slider",
    element: make("div", { className: "slide" }, slider, input),
    inputs: [input, slider],
    get: () => {
      if (input.validity.badInput) return "";
      return input.value === "" ? undefined : Number(input.value);
    },
    set: (value) => {
      input.value = value;
      slider.value = value;
    },
  };
}

// A seed may be larger than what JavaScript's numbers hold, so its digits travel as they are.
function anyNumber(field) {
  const read = (text) => {
    const isExact = Number.isFinite(Number(text)) && String(Number(text)) === text;
    return isExact ? Number(text) : text;
  };
  const control = line(field, "text", read);
  control.element.inputMode = field.type === "integer" ? "numeric" : "decimal";
  control.element.placeholder = field.default === null ? "random" : field.default;
  return control;
}

function toggle() {
  const input = make("input", { type: "checkbox" });
  input.setAttribute("role", "switch");
  return {
    element: input,
    inputs: [input],
    get: () => input.checked,
    set: (value) => {
      input.checked = Boolean(value);
    },
  };
}

function choice(field) {
  const radios = field.choices.map((value) => {
    const input = make("input", { type: "radio", name: `choice-${field.name}`, value });
    const text = make("span", { textContent: String(value) });
    return { value, input, element: make("label", {}, input, text) };
  });
  return {
    isGroup: true,
    kind: "choice",
    element: make("div", { className: "choices" }, ...radios.map((radio) => radio.element)),
    inputs: radios.map((radio) => radio.input),
    get: () => radios.find((radio) => radio.input.checked)?.value,
    set: (value) => {
      for (const radio of radios) radio.input.checked = radio.value === value;
    },
  };
}

function size(field, presets) {
  const names = field.choices ?? Object.keys(presets);
  const radios = [...names, null].map((name) => {
    const input = make("input", { type: "radio", name: "size", value: name ?? "custom" });
    const text = name === null ? "Custom" : inWords(name);
    const detail = name === null ? "" : presets[name].join(" × ");
    return { name, input, element: make("label", {}, input, shape(presets[name]),
      make("span", { textContent: text }), make("small", { textContent: detail })) };
  });
  const sides = ["width", "height"].map((side) =>
    make("input", { type: "number", step: 16, inputMode: "numeric", autocomplete: "off",
      ariaLabel: inWords(side), min: field.minimum ?? "", max: field.maximum ?? "" }));
  const [width, height] = sides;
  const custom = make("div", { className: "sides", hidden: true },
    width, make("span", { textContent: "×", ariaHidden: "true" }), height);
  const chosen = () => radios.find((radio) => radio.input.checked);
  const update = () => {
    custom.hidden = chosen()?.name !== null;
  };
  for (const { name, input } of radios) {
    input.addEventListener("change", () => {
      if (name !== null) [width.value, height.value] = presets[name];
      update();
    });
  }
  const value = (input) => (input.value === "" ? null : Number(input.value));
  return {
    isGroup: true,
    element: make("div", { className: "shapes" }, ...radios.map((one) => one.element), custom),
    inputs: [...radios.map((radio) => radio.input), ...sides],
    get: () => {
      const { name } = chosen() ?? {};
      return name === null ? { width: value(width), height: value(height) } : name;
    },
    set: (asked) => {
      const isCustom = typeof asked === "object" && asked !== null;
      for (const { name, input } of radios) input.checked = isCustom ? name === null : name === asked;
      const sizes = sizeOf(asked, presets);
      if (sizes) [width.value, height.value] = sizes;
      update();
    },
  };
}

/** A small outline of a picture's shape. */
function shape(pixels) {
  const [width, height] = pixels ?? [1, 1];
  const scale = 18 / Math.max(width, height);
  const outline = make("i", { ariaHidden: "true" });
  outline.style.width = `${width * scale}px`;
  outline.style.height = `${height * scale}px`;
  if (!pixels) outline.classList.add("free");
  return outline;
}
