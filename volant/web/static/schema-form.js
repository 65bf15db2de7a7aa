/**
 * A form from a JSON Schema. It knows strings, numbers, booleans, enumerations and arrays of those; everything else is a
 * field for JSON. Schemas come from others: nothing is taken for granted in them, and all of their text is shown as text.
 */
import { clean, html } from "./ui.js";

const MOST_FIELDS = 60;
const MOST_CHOICES = 500;
const MOST_ITEMS = 200;
/** Strings that may be longer get several lines. */
const ONE_LINE = 4096;

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isScalar = (value) => value === null || ["string", "number", "boolean"].includes(typeof value);
const isText = (value) => typeof value === "string";

/** Returns how a value is asked for: `text`, `number`, `integer`, `boolean`, `choice`, `list` or `json`. */
function kindOf(schema) {
  if (!isObject(schema)) return "json";
  if (["anyOf", "oneOf", "allOf", "$ref", "not", "if"].some((word) => Object.hasOwn(schema, word))) return "json";
  if (Array.isArray(schema.enum)) return schema.enum.length && schema.enum.length <= MOST_CHOICES && schema.enum.every(isScalar) ? "choice" : "json";
  if (schema.type === "array") return ["json", "list"].includes(kindOf(schema.items)) ? "json" : "list";
  return { string: "text", number: "number", integer: "integer", boolean: "boolean" }[schema.type] ?? "json";
}

/** Whether a value, such as a default, can be shown by a field of this kind. */
function fits(kind, schema, value) {
  if (value === undefined) return false;
  if (kind === "text") return isText(value);
  if (kind === "number" || kind === "integer") return typeof value === "number";
  if (kind === "boolean") return typeof value === "boolean";
  if (kind === "choice") return schema.enum.includes(value);
  if (kind === "list") return Array.isArray(value) && value.length <= MOST_ITEMS && value.every((one) => fits(kindOf(schema.items), schema.items, one));
  return true;
}

/** Returns what a field shows of a value. Choices are shown by their place, as a number and its text may both be one. */
function shown(kind, schema, value) {
  if (kind === "choice") return String(schema.enum.indexOf(value));
  if (kind === "list") return value.map((one) => shown(kindOf(schema.items), schema.items, one));
  if (kind === "boolean") return value;
  return kind === "json" ? JSON.stringify(value, null, 2) : String(value);
}

/** Returns what is in a new field. */
function blank(kind, schema, required) {
  if (fits(kind, schema, schema?.default)) return shown(kind, schema, schema.default);
  if (kind === "list") return [];
  return kind === "boolean" && required ? false : "";
}

/**
 * Returns the fields of an action's input, each with its `name`, `schema`, `kind` and whether it is `required`.
 * null: it is no object with few enough properties, and is asked for as one piece of JSON.
 */
export function fieldsOf(schema) {
  if (!isObject(schema) || schema.type !== "object" || !isObject(schema.properties)) return null;
  const found = Object.entries(schema.properties);
  if (found.length > MOST_FIELDS) return null;
  const required = new Set(Array.isArray(schema.required) ? schema.required : []);
  return found.map(([name, one]) => ({ name, schema: one, kind: kindOf(one), required: required.has(name) }));
}

/** Returns what the fields have at first, by name. */
export const blanks = (fields) => new Map(fields.map(({ name, kind, schema, required }) => [name, blank(kind, schema, required)]));

/** Returns the body that the fields make. @throws {Error} one of them is wrong; it says which. */
export function bodyOf(fields, values) {
  const members = [];
  for (const { name, kind, schema, required } of fields) {
    const value = read(kind, schema, values.get(name), required, name);
    if (value !== undefined) members.push([name, value]);
  }
  // So that a member named __proto__ is one, too.
  return Object.fromEntries(members);
}

function read(kind, schema, value, required, name) {
  if (kind === "list") {
    if (!value.length && !required) return undefined;
    return value.map((one, at) => read(kindOf(schema.items), schema.items, one, true, `${name}, item ${at + 1}`));
  }
  if (kind === "boolean") return value === "" ? undefined : value === true || value === "true";
  if (value === "") {
    if (!required) return undefined;
    if (kind === "text" && !(schema.minLength > 0)) return "";
    throw new Error(`${name} is missing`);
  }
  if (kind === "choice") return schema.enum[Number(value)];
  if (kind === "text") return value;
  if (kind === "json") return parsed(value, name);
  const number = Number(value);
  if (!Number.isFinite(number) || (kind === "integer" && !Number.isInteger(number))) throw new Error(`${name} has to be ${kind === "integer" ? "a whole number" : "a number"}`);
  if (Number.isInteger(number) && !Number.isSafeInteger(number)) throw new Error(`${name} is too large to be sent exactly from a page`);
  return number;
}

/** Reads JSON; `name` is for the error. @throws {Error} */
export function parsed(text, name) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${name} is not valid JSON: ${error.message}`);
  }
}

/** Shows the fields. `onChange` gets all values. */
export function Fields({ fields, values, onChange }) {
  return fields.map((field) => html`<${Field} key=${field.name} field=${field} value=${values.get(field.name)}
    onChange=${(value) => onChange(new Map(values).set(field.name, value))}/>`);
}

function Field({ field: { name, schema, kind, required }, value, onChange }) {
  const title = html`<span class="said">${clean(isText(schema?.title) && schema.title ? `${schema.title} (${name})` : name)}${required && html` <span class="quiet">(required)</span>`}</span>`;
  const hint = isText(schema?.description) && schema.description && html`<small class="said">${clean(schema.description)}</small>`;
  if (kind === "list") return html`<${List} name=${name} title=${title} hint=${hint} schema=${schema} value=${value} onChange=${onChange}/>`;
  if (kind === "boolean" && (required || typeof schema.default === "boolean")) {
    return html`<div class="field" style="margin-bottom: 10px"><label class="check"><input type="checkbox" name=${name} checked=${value === true} onChange=${(event) => onChange(event.target.checked)}/>${title}</label>
      ${hint && html`<div>${hint}</div>`}</div>`;
  }
  return html`<label class="field">${title}<${Input} name=${name} kind=${kind} schema=${schema} required=${required} value=${value} onChange=${onChange}/>${hint}</label>`;
}

function Input({ name, label, kind, schema, required, value, onChange }) {
  const more = { name, "aria-label": label, value: String(value), onInput: (event) => onChange(event.target.value) };
  if (kind === "choice" || kind === "boolean") {
    const choices = kind === "boolean" ? [["true", "yes"], ["false", "no"]] : schema.enum.map((one, at) => [String(at), isText(one) ? one : JSON.stringify(one)]);
    return html`<select ...${more} required=${required} onChange=${more.onInput}><option value="">${required ? "Choose one" : "Not set"}</option>${choices.map(([key, text]) => html`<option value=${key}>${clean(text)}</option>`)}</select>`;
  }
  if (kind === "json") return html`<textarea ...${more} required=${required} placeholder="JSON" spellcheck=${false}></textarea>`;
  if (kind === "text") {
    const long = schema.maxLength > ONE_LINE || schema.contentMediaType !== undefined;
    return long ? html`<textarea ...${more} spellcheck=${false}></textarea>` : html`<input ...${more} required=${required && schema.minLength > 0} autocomplete="off" spellcheck=${false}/>`;
  }
  const bound = (word) => (typeof schema[word] === "number" ? schema[word] : undefined);
  return html`<input ...${more} type="number" required=${required} min=${bound("minimum")} max=${bound("maximum")} step=${kind === "integer" && Number.isInteger(bound("minimum") ?? 0) ? 1 : "any"}/>`;
}

function List({ name, title, hint, schema, value, onChange }) {
  const { items } = schema;
  const kind = kindOf(items);
  const change = (at, one) => onChange(value.map((other, place) => (place === at ? one : other)));
  return html`<fieldset class="items"><legend>${title}</legend>
    ${value.map((one, at) => html`<div class="row" style="flex-wrap: nowrap"><${Input} label=${`${clean(name)}, item ${at + 1}`} kind=${kind} schema=${items} required value=${one} onChange=${(next) => change(at, next)}/>
      <button type="button" aria-label=${`Remove item ${at + 1} of ${clean(name)}`} onClick=${() => onChange(value.filter((_, place) => place !== at))}>✕</button></div>`)}
    <button type="button" disabled=${value.length >= MOST_ITEMS} onClick=${() => onChange([...value, blank(kind, items, true)])}>Add to ${clean(name)}</button>
    ${hint && html`<div>${hint}</div>`}</fieldset>`;
}
