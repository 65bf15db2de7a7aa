// chrome-remote-interface, as it comes: ENDPOINT PAGE [KEY]. Prints what it saw.
import CDP from "chrome-remote-interface";
import { seen, TEXT } from "./devtools_seen.mjs";

const [endpoint, page, key] = process.argv.slice(2);
const { hostname, port, pathname } = new URL(endpoint);
const options = {
  host: hostname,
  port: Number(port),
  // It asks for the WebSocket's path too, which has the prefix already, and a ticket instead of the key.
  alterPath: (path) =>
    path.startsWith(pathname) ? path : pathname + path + (key ? `${path.includes("?") ? "&" : "?"}api_key=${key}` : ""),
};
const { Browser } = await CDP.Version(options);
const target = await CDP.New({ ...options, url: "about:blank" });
await CDP.Activate({ ...options, id: target.id });
const client = await CDP({ ...options, target: (targets) => targets.find(({ id }) => id === target.id) });
const { Page, Runtime } = client;
await Page.enable();
await Promise.all([Page.loadEventFired(), Page.navigate({ url: page })]);
const { result } = await Runtime.evaluate({ expression: TEXT });
const { cssContentSize } = await Page.getLayoutMetrics();
const clip = { ...cssContentSize, scale: 1 };
const { data } = await Page.captureScreenshot({ clip, captureBeyondViewport: true, optimizeForSpeed: true });
await client.close();
await CDP.Close({ ...options, id: target.id });
// It answers that it is closing.
while ((await CDP.List(options)).some(({ id }) => id === target.id)) await new Promise((go) => setTimeout(go, 100));
seen(Browser, result.value, Buffer.from(data, "base64"));
