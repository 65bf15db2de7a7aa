/** The schemas of an OpenAPI document: a type in a line, and a value that shows its shape. */
import { html } from "./ui.js";

/** Follows a reference within the document. */
export function resolve(root, value) {
  return value?.$ref ? value.$ref.slice(2).split("/").reduce((at, name) => at[name], root) : value;
}

const nameOf = (schema) => schema.$ref.split("/").at(-1);
/** Whether a schema is that of the empty body. */
export const isNothing = (schema) => Boolean(schema?.$ref) && nameOf(schema) === "Nothing";

const between = (parts, separator) => parts.flatMap((part, at) => (at ? [separator, part] : [part]));

/** The type of a schema in a line, with a link to each struct. */
export const Kind = ({ of }) => html`<code class="kind">${kind(of)}</code>`;

function kind(schema) {
  if (!schema || !Object.keys(schema).length) return "anything";
  if (schema.$ref) return html`<a href=${`#${nameOf(schema)}`}>${nameOf(schema)}</a>`;
  if (schema.anyOf) return between(schema.anyOf.map(kind), " | ");
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
  if (schema.type === "array") return ["[", schema.prefixItems ? between(schema.prefixItems.map(kind), ", ") : kind(schema.items), "]"];
  if (schema.additionalProperties instanceof Object) return ["{string: ", kind(schema.additionalProperties), "}"];
  const { minimum, maximum } = schema;
  return `${schema.format ?? schema.type ?? "anything"}${minimum === undefined && maximum === undefined ? "" : ` ${minimum ?? ""}–${maximum ?? ""}`}`;
}

/** What members are called that have a text which says more than others. */
const TEXTS = { name: "web", vm: "web", project: "default", plugin: "base", reference: "nginx:1.29", ip_address: "10.0.0.2", version: "1.0", caller: "key:ci" };
const DEEPEST = 6;

/** Returns a value that a schema allows, for people to see its shape. */
export function sample(root, schema, member = "", depth = 0) {
  const found = resolve(root, schema);
  if (!found || depth > DEEPEST) return null;
  if (found.enum) return found.enum[0];
  if (found.anyOf) {
    const none = found.anyOf.find((one) => one.type === "null");
    const one = found.anyOf.find((other) => other !== none);
    // What is not always there and is large is left out.
    return none && resolve(root, one).properties ? null : sample(root, one, member, depth);
  }
  if (found.type === "object") {
    return Object.fromEntries(Object.entries(found.properties ?? {}).map(([name, one]) => [name, sample(root, one, name, depth + 1)]));
  }
  if (found.type === "array") return found.items && Object.keys(found.items).length ? [sample(root, found.items, member, depth + 1)] : [];
  if (found.type === "boolean") return false;
  if (found.type === "integer" || found.type === "number") return found.minimum ?? 1;
  if (found.type !== "string") return null;
  return found.format === "date-time" ? "2026-01-31T12:00:00Z" : TEXTS[member] ?? "…";
}
