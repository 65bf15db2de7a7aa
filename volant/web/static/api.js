/**
 * The client of Volant's API for web pages: requests, event streams and WebSockets, with or without a session.
 *
 * It knows nothing of the console and imports nothing. A page never holds a key: `signIn` exchanges one for a session,
 * whose cookie scripts don't see, and whose other half, the proof, this module keeps in the origin's storage. With
 * `beginSignIn` and `finishSignIn` the daemon gets a token of its issuer itself.
 */

const PROOF = "volant-session";
/** The proof of a sign-in at the issuer that this tab has begun. */
const ATTEMPT = "volant-sign-in";
const PATIENCE_MS = 30_000;

/** An answer that is an error (RFC 9457), or none: then `status` is 0. */
export class ApiError extends Error {
  constructor({ status = 0, code = "unreachable", detail = "the daemon can't be reached", hint, field, requestId } = {}) {
    super(detail);
    Object.assign(this, { status, code, detail, hint, field, requestId });
  }
}

export class Client {
  /** @param {string} base the daemon's address; by default that of the page */
  constructor(base = new URL(".", document.baseURI).href) {
    this.base = base;
    /** Called when the session has ended. */
    this.onSignedOut = () => {};
  }

  /** Calls `listener` when another page of this origin has signed in (`true`) or out. */
  onOtherPage(listener) {
    addEventListener("storage", ({ key, newValue }) => { if (key === PROOF || key === null) listener(newValue !== null); });
  }

  get proof() {
    return localStorage.getItem(PROOF);
  }

  /**
   * Sends a request.
   * @param {string} method
   * @param {string} path such as `api/v1/vms`; see `path` for names in it
   * @param {{query?: object, body?: any, project?: string, signal?: AbortSignal, headers?: object,
   *   patience?: number, guest?: boolean, any?: boolean}} options `body`: JSON, or a Blob as it is; `patience`:
   *   milliseconds; `guest`: an answer of the guest's is returned, whatever its status; `any`: each answer is
   * @returns {Promise<Response>} a successful one, but for `guest` and `any`
   * @throws {ApiError}
   */
  async send(method, path, { query, body, project, signal, headers = {}, patience = PATIENCE_MS, guest = false, any = false } = {}) {
    const url = new URL(path, this.base);
    for (const [name, value] of entries(query)) url.searchParams.append(name, value);
    const sent = { ...headers };
    if (this.proof) sent["Volant-Session"] = this.proof;
    if (project) sent["Volant-Project"] = project;
    if (body !== undefined && !(body instanceof Blob)) {
      sent["Content-Type"] = "application/json";
      body = JSON.stringify(body);
    }
    const deadline = patience ? AbortSignal.timeout(patience) : undefined;
    const signals = [signal, deadline].filter(Boolean);
    let answer;
    try {
      answer = await fetch(url, {
        method, body, headers: sent, cache: "no-store", credentials: "same-origin",
        signal: signals.length ? AbortSignal.any(signals) : undefined,
      });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ApiError(deadline?.aborted ? { code: "deadline", detail: "the daemon has not answered in time" } : {});
    }
    if (answer.ok || any || (guest && isGuests(answer))) return answer;
    throw await this.#problem(answer);
  }

  /** Sends a request; returns the JSON of the answer, or null. */
  async json(method, path, options) {
    const answer = await this.send(method, path, options);
    return answer.status === 204 ? null : answer.json();
  }

  get = (path, options) => this.json("GET", path, options);
  del = (path, options) => this.json("DELETE", path, options);
  put = (path, body, options) => this.json("PUT", path, { ...options, body });

  /** Posts with an idempotency key, so that a repeated request is done once. */
  post(path, body, { idempotent = false, ...options } = {}) {
    const headers = idempotent ? { "Idempotency-Key": randomWord(), ...options.headers } : options.headers;
    return this.json("POST", path, { ...options, headers, body });
  }

  /** Returns who the page acts for, and what it may do. @throws {ApiError} 401: it has to sign in. */
  session() {
    return this.get("api/v1/session");
  }

  /** Exchanges a key or a token for a session. */
  async signIn(key) {
    return this.#begun(await this.json("POST", "api/v1/session", { body: { key } }));
  }

  #begun({ proof, ...session }) {
    localStorage.setItem(PROOF, proof);
    return session;
  }

  /** Begins to sign in at the issuer. Returns the address to go on at; the issuer sends the browser back. */
  async beginSignIn() {
    const { proof, url } = await this.json("POST", "api/v1/session/oidc", { body: {} });
    sessionStorage.setItem(ATTEMPT, proof);
    return url;
  }

  /**
   * Ends a sign-in at the issuer that this tab has begun.
   * @returns {Promise<object|null>} the session; null: it has begun none, or has left the issuer without an answer
   * @throws {ApiError} why it has failed
   */
  async finishSignIn() {
    const proof = sessionStorage.getItem(ATTEMPT);
    if (proof === null) return null;
    try {
      const session = this.#begun(await this.json("POST", "api/v1/session/oidc/finish", { body: { proof } }));
      sessionStorage.removeItem(ATTEMPT);
      return session;
    } catch (error) {
      if (error.code === "sign-in-unfinished") return null;
      if (error.status) sessionStorage.removeItem(ATTEMPT);
      throw error;
    }
  }

  /** Ends the session and all that is open in it. */
  async signOut() {
    try {
      await this.del("api/v1/session");
    } finally {
      localStorage.removeItem(PROOF);
    }
  }

  /**
   * Opens an event stream. It does not reconnect: its ticket is used up.
   * @returns {Promise<EventSource>}
   */
  async events(path, { query, project } = {}) {
    return new EventSource(await this.#address(path, query, project));
  }

  /**
   * Opens a WebSocket.
   * @param {{query?: object, project?: string, guest?: boolean}} options `guest`: the query is the guest's
   * @returns {Promise<WebSocket>}
   */
  async socket(path, { query, project, guest = false } = {}) {
    const url = await this.#address(path, query, project, guest);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = new WebSocket(url);
    socket.binaryType = "arraybuffer";
    return socket;
  }

  async #address(path, query, project, guest) {
    const url = new URL(path, this.base);
    for (const [name, value] of entries(query)) url.searchParams.append(name, value);
    if (project && !guest) url.searchParams.set("project", project);
    if (this.proof) {
      const { ticket } = await this.post("api/v1/tickets", {}, { project: guest ? project : undefined });
      url.searchParams.set("ticket", ticket);
    }
    return url;
  }

  async #problem(answer) {
    let found = {};
    try {
      found = await answer.json();
    } catch {
      // A proxy's page, perhaps.
    }
    const code = String(found.type ?? "").replace("urn:volant:error:", "") || `http-${answer.status}`;
    if (answer.status === 401 && !answer.url.endsWith("/api/v1/session")) this.onSignedOut(code);
    const detail = String(found.detail ?? `${answer.status} ${answer.statusText}`);
    return new ApiError({
      status: answer.status, code, detail, hint: found.hint, field: found.field, requestId: found.request_id,
    });
  }
}

/** Makes a path of names, as a template string's tag: path`api/v1/vms/${name}`. */
export function path(texts, ...names) {
  return texts.reduce((made, text, at) => made + encodeURIComponent(names[at - 1]) + text);
}

/** Whether a guest has answered: the daemon adds a header to what guests send, which they can't remove. */
const isGuests = (answer) => (answer.headers.get("Content-Security-Policy") ?? "").split(",").some((part) => part.trim() === "sandbox");

function* entries(query) {
  for (const [name, value] of Object.entries(query ?? {})) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== undefined && one !== null && one !== "") yield [name, String(one)];
    }
  }
}

export function randomWord() {
  // crypto.randomUUID needs a secure context, and a page over plain HTTP is none.
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
