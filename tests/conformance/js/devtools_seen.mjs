// What each DevTools client does with the page, and tells of it.
import { crc32 } from "node:zlib";

export const TEXT = "document.querySelector('h1').textContent + ' ' + (6 * 7)";

export function seen(browser, text, picture) {
  const png = Buffer.from(picture);
  check(png);
  console.log(JSON.stringify({ browser, text, width: png.readUInt32BE(16), height: png.readUInt32BE(20), bytes: png.length }));
}

// Every chunk of a PNG has a checksum: not a byte of it is another.
function check(png) {
  let at = 8;
  for (let type = ""; type !== "IEND"; ) {
    const end = at + 8 + png.readUInt32BE(at);
    type = png.toString("latin1", at + 4, at + 8);
    if (crc32(png.subarray(at + 4, end)) !== png.readUInt32BE(end)) throw new Error(`the screenshot's ${type} is broken`);
    at = end + 4;
  }
  if (at !== png.length) throw new Error("something follows the screenshot");
}
