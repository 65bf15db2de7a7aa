/** What a request was answered with: text, a picture, or bytes to save. */
import { useEffect, useState } from "preact/hooks";
import { save } from "../bodies.js";
import { Said, State, bytes, clean, html, plain } from "../ui.js";

/** Bytes of an answer that the page takes, and characters of it that it shows. */
export const TAKEN = 64 * 1024 * 1024;
export const SHOWN = 200_000;
const PICTURES = ["image/png", "image/jpeg", "image/webp", "image/gif"];

/** Shows an answer. `name`: of the file that it is saved as; `whole`: what takes one that is too long for a page. */
export function Answer({ of: { status, type, blob, ms }, name, whole }) {
  const [shown, setShown] = useState(null);
  const kind = type.split(";")[0].trim().toLowerCase();
  const picture = blob && PICTURES.includes(kind);
  useEffect(() => {
    if (!blob) return undefined;
    if (picture) {
      // The type is one of the list, whatever else the guest has said.
      const address = URL.createObjectURL(new Blob([blob], { type: kind }));
      setShown(address);
      return () => URL.revokeObjectURL(address);
    }
    blob.slice(0, 4 * SHOWN).arrayBuffer().then((data) => setShown(readable(data, kind, blob.size)));
    return undefined;
  }, []);
  return html`<p class="row"><${State} of=${status < 400 ? "ok" : "failed"}/> <span class="num">${status}</span> <span class="quiet"><${Said}>${type}<//></span>
      <span class="quiet num">${blob ? bytes(blob.size) : `more than ${bytes(TAKEN)}`}, ${Math.round(ms)} ms</span>
      ${blob?.size > 0 && html`<button onClick=${() => save(blob, name)}>Download</button>`}</p>
    ${!blob ? html`<p class="quiet">It is too long for a page. ${whole} takes it whole.</p>`
      : !blob.size ? html`<p class="quiet">It has no body.</p>`
      : shown === null ? null
      : picture ? html`<img class="answer" src=${shown} alt=${`What ${clean(name)} has answered, a picture`}/>`
      : shown === "" ? html`<p class="quiet">These are bytes, and no text.</p>`
      : html`<div class="code"><pre tabindex="0" aria-label="The answer's body">${plain(shown)}</pre></div>`}`;
}

/** Returns bytes as text, JSON with line ends; "": they are no text. */
function readable(data, kind, size) {
  let text;
  try {
    // A cut may be within a character.
    text = new TextDecoder("utf-8", { fatal: true }).decode(data, { stream: data.byteLength < size });
  } catch {
    return "";
  }
  if (kind.endsWith("json") && data.byteLength === size) {
    try {
      text = JSON.stringify(JSON.parse(text), null, 2);
    } catch {
      // Then as it is.
    }
  }
  return text.length > SHOWN ? `${text.slice(0, SHOWN)}\n… and more` : text;
}
