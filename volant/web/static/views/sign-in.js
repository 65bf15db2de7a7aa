import { useEffect, useState } from "preact/hooks";
import { client, leaveForIssuer, signIn, signInProblem } from "../store.js";
import { Problem, clean, html } from "../ui.js";

export function SignIn({ mark, why }) {
  const [problem, setProblem] = useState(signInProblem.value);
  const [busy, setBusy] = useState(false);
  const [issuer, setIssuer] = useState("");
  useEffect(() => {
    client.get("api/v1/auth").then((auth) => { if (auth.browser_sign_in) setIssuer(new URL(auth.sign_in.issuer).host); }, () => {});
    // A page that left for the issuer, and that the browser shows again as it was.
    const back = () => setBusy(false);
    addEventListener("pageshow", back);
    return () => removeEventListener("pageshow", back);
  }, []);
  const attempt = async (how) => {
    setBusy(true);
    setProblem(null);
    try {
      await how();
    } catch (error) {
      setProblem(error);
      setBusy(false);
    }
  };
  const submit = (event) => {
    event.preventDefault();
    const field = event.target.elements.key;
    const key = field.value.trim();
    // The page keeps the key nowhere.
    field.value = "";
    attempt(() => signIn(key));
  };
  return html`<main class="sign-in"><h1 class="brand">${mark}Volant</h1>
    ${why && !problem && html`<div class="note" role="status">${why}</div>`}
    <form class="panel" onSubmit=${submit}>
      <${Problem} of=${problem}/>
      ${issuer && html`<button type="button" class="first" disabled=${busy} onClick=${() => attempt(leaveForIssuer)}>Sign in with ${clean(issuer)}</button>
        <p class="quiet or">or with a key</p>`}
      <label class="field"><span>API key</span>
        <input name="key" type="password" required autofocus autocomplete="off" spellcheck=${false} placeholder="vlt_…"/></label>
      <button class=${issuer ? "" : "first"} disabled=${busy}>Sign in</button>
    </form>
    <p class="quiet" style="margin-top: 12px">A key begins a session of 12 hours in this browser, and is not kept. An
      administrator makes keys with <code>volar keys create</code>.</p></main>`;
}
