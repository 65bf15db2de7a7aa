// Playwright, as it comes: ENDPOINT PAGE [KEY]. Prints what it saw.
import { chromium } from "playwright-core";
import { seen, TEXT } from "./devtools_seen.mjs";

const [endpoint, page, key] = process.argv.slice(2);
const headers = key ? { "X-Volant-API-Key": key } : {};
const browser = await chromium.connectOverCDP(endpoint, { headers, timeout: 120_000 });
const context = await browser.newContext();
const tab = await context.newPage();
await tab.goto(page, { timeout: 120_000 });
const text = await tab.evaluate(TEXT);
const picture = await tab.screenshot({ fullPage: true, timeout: 300_000 });
await context.close();
await browser.close();
seen(browser.version(), text, picture);
