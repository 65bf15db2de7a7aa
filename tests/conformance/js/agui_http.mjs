// Runs AG-UI's HttpAgent, as it comes, against a URL; prints its events, and its state at the end.
import { HttpAgent } from "@ag-ui/client";

const agent = new HttpAgent({ url: process.argv[2], threadId: "thread-of-http", headers: {} });
const events = [];
let failure = null;
await agent
  .runAgent({ runId: "run-of-http" }, {
    onEvent: ({ event }) => void events.push(event),
    onRunFailed: ({ error }) => void (failure = String(error)),
  })
  .catch((error) => (failure = String(error)));
console.log(JSON.stringify({ events, failure, state: agent.state, messages: agent.messages }));
