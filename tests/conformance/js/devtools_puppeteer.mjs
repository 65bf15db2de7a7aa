// Puppeteer, as it comes: ENDPOINT PAGE [KEY]. Prints what it saw.
import puppeteer from "puppeteer-core";
import { seen, TEXT } from "./devtools_seen.mjs";

const [endpoint, page, key] = process.argv.slice(2);
const browser = await puppeteer.connect({
  browserWSEndpoint: endpoint.replace(/^http/, "ws") + "/browser",
  defaultViewport: { width: 1280, height: 720 },
  protocolTimeout: 300_000,
  wsOptions: { headers: key ? { "X-Volant-API-Key": key } : {} },
});
const tab = await browser.newPage();
await tab.goto(page, { timeout: 120_000 });
const text = await tab.evaluate(TEXT);
const picture = await tab.screenshot({ fullPage: true, optimizeForSpeed: true });
const version = await browser.version();
await tab.close();
await browser.disconnect();
seen(version, text, picture);
