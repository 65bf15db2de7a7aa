/**
 * One event stream for all tabs of a browser, as it allows six connections to an origin. The tab that holds a lock leads:
 * it has the stream, and passes on what it hears. When it closes, or is hidden for long, the next one leads.
 *
 * A tab applies what is passed on only if it continues where the tab is. Otherwise it asks the leader for all that it has,
 * and continues there. So a change of the leader makes no hole, and no event counts twice.
 *
 * Locks are there in secure contexts alone (TLS, or localhost). Elsewhere each tab leads itself.
 */
import { randomWord } from "./api.js";

export class Tabs {
  #name;
  #page;
  #channel = null;
  #leads = false;
  #me = randomWord();
  /** The stream of a leader that this tab is at, and how many of its events it has. */
  #stream = null;
  #count = 0;
  #asked = false;
  #gap = false;

  /**
   * @param {string} name the same for tabs that see the same
   * @param {{position: () => any, state: () => any, replace: (state) => void, take: (said) => void, status: (said) => void,
   *   missed: () => void}} page
   *   `position`: after which event it is, null at the beginning; `state`: all that it has; `replace`: all of that was
   *   missed; `take`: the next event; `status`: of the leader's connection; `missed`: the daemon had no longer all events
   */
  constructor(name, page) {
    this.#name = name;
    this.#page = page;
    if (!navigator.locks) return;
    this.#channel = new BroadcastChannel(name);
    this.#channel.onmessage = ({ data }) => this.#hear(data);
    this.#ask();
  }

  close() {
    this.#channel?.close();
    this.#channel = null;
  }

  /** Waits until no other tab leads, and leads while `work` is under way. */
  async lead(work, signal) {
    const run = async () => {
      this.#leads = true;
      this.#asked = false;
      try {
        await work();
      } finally {
        this.#leads = false;
      }
    };
    if (!this.#channel) return run();
    return navigator.locks.request(this.#name, { signal }, run);
  }

  /** The daemon had no longer all events: the leader's next stream does not continue after the last one. */
  missed() {
    this.#gap = true;
  }

  /** The leader has a new stream. */
  begin() {
    this.#stream = randomWord();
    this.#count = 0;
    this.#say({ kind: "begin", stream: this.#stream, from: this.#page.position(), gap: this.#gap });
    this.#gap = false;
  }

  /** Passes on an event of the leader's stream. */
  pass(said) {
    this.#count++;
    this.#say({ kind: "event", stream: this.#stream, count: this.#count, said });
  }

  /** Passes on what the leader's connection is like. */
  status(said) {
    this.#say({ kind: "status", said });
  }

  #say(message) {
    this.#channel?.postMessage(message);
  }

  #ask() {
    if (this.#asked) return;
    this.#asked = true;
    this.#say({ kind: "ask", me: this.#me });
  }

  #hear({ kind, stream, count, from, gap, said, me }) {
    const page = this.#page;
    if (kind === "ask") {
      if (this.#leads) this.#say({ kind: page.position() === null ? "status" : "state", stream: this.#stream, count: this.#count, me, said: page.state() });
    } else if (this.#leads) {
      // Of a leader that was before.
    } else if (kind === "begin") {
      this.#asked = false;
      if (gap) page.missed();
      if (from !== page.position()) return this.#ask();
      [this.#stream, this.#count] = [stream, 0];
      page.status({ connection: "live" });
    } else if (kind === "event") {
      if (stream !== this.#stream || count > this.#count + 1) return this.#ask();
      if (count <= this.#count) return undefined;
      this.#count = count;
      page.take(said);
    } else if (kind === "state" && me === this.#me) {
      this.#asked = false;
      [this.#stream, this.#count] = [stream, count];
      page.replace(said);
    } else if (kind === "status") {
      page.status(said);
    }
    return undefined;
  }
}
