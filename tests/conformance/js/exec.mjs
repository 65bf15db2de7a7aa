// Node's own WebSocket against a command in a guest. Arguments: the address of the exec route (ws://…).
const base = process.argv[2];

function open(query = "") {
  const socket = new WebSocket(base + query);
  socket.binaryType = "arraybuffer";
  const talk = { socket, texts: [], out: { 1: [], 2: [] }, ends: [], extensions: null };
  talk.opened = new Promise((resolve, reject) => {
    socket.onopen = () => { talk.extensions = socket.extensions; resolve(); };
    socket.onerror = () => reject(new Error("it does not open"));
  });
  talk.closed = new Promise((resolve) => {
    socket.onclose = (event) => resolve({ code: event.code, clean: event.wasClean });
  });
  talk.waiting = [];
  socket.onmessage = ({ data }) => {
    if (typeof data === "string") {
      talk.texts.push(JSON.parse(data));
    } else {
      const bytes = new Uint8Array(data);
      if (bytes.length === 1) talk.ends.push(bytes[0]);
      else talk.out[bytes[0]].push(Buffer.from(bytes.subarray(1)));
    }
    talk.waiting.forEach((look) => look());
  };
  talk.until = (ready) => new Promise((resolve, reject) => {
    talk.closed.then((how) => reject(new Error(`it has closed: ${JSON.stringify(how)}, ${JSON.stringify(talk.texts)}`)));
    const look = () => ready() && resolve();
    talk.waiting.push(look);
    look();
  });
  talk.text = (channel) => Buffer.concat(talk.out[channel]).toString();
  talk.stdin = (text) => socket.send(Buffer.concat([Buffer.from([0]), Buffer.from(text)]));
  return talk;
}

// Channels, their ends, the exit code, and a clean close.
const plain = open();
await plain.opened;
plain.socket.send(JSON.stringify({ command: ["sh", "-c", "cat; echo err >&2; exit 3"] }));
plain.stdin("grüße ");
plain.stdin("x".repeat(200000));
plain.stdin("");
console.log(JSON.stringify({
  close: await plain.closed, last: plain.texts.at(-1), length: plain.text(1).length, err: plain.text(2),
  ends: plain.ends.sort(), extensions: plain.extensions,
}));

// A terminal, a resize, a signal.
const tty = open();
await tty.opened;
const script = "stty size; trap 'stty size' WINCH; trap 'exit 44' TERM; echo ready; while :; do sleep 0.1; done";
tty.socket.send(JSON.stringify({ command: ["sh", "-c", script], tty: true, rows: 20, cols: 70 }));
await tty.until(() => tty.text(1).includes("ready"));
tty.socket.send(JSON.stringify({ resize: [33, 99] }));
await tty.until(() => tty.text(1).includes("33 99"));
tty.socket.send(JSON.stringify({ signal: 15 }));
console.log(JSON.stringify({ close: await tty.closed, last: tty.texts.at(-1), first: tty.text(1).split("\r\n")[0] }));

// Detached, left, found again.
const first = open("?detach=true");
await first.opened;
first.socket.send(JSON.stringify({ command: ["sh", "-c", "echo one; read go; echo two"] }));
await first.until(() => first.text(1) === "one\n");
first.socket.close();
await first.closed;
const second = open(`?attach=${first.texts[0].id}&from=4`);
await second.opened;
second.stdin("go\n");
console.log(JSON.stringify({ close: await second.closed, texts: second.texts.slice(1), out: second.text(1) }));
process.exit(0);
