/** Bodies of answers, which guests may make as long as they like. */

/**
 * Returns the body of an answer; null: it has more than `most` bytes, and the rest is not read.
 * @param {(piece: Uint8Array) => void} onPiece gets each piece as it comes
 */
export async function atMost(most, answer, onPiece = () => {}) {
  const reader = answer.body?.getReader();
  const pieces = [];
  let size = 0;
  for (let piece = await reader?.read(); piece && !piece.done; piece = await reader.read()) {
    pieces.push(piece.value);
    onPiece(piece.value);
    size += piece.value.length;
    if (size > most) {
      await reader.cancel();
      return null;
    }
  }
  return new Blob(pieces);
}

/** Saves bytes as a file of the reader's. */
export function save(blob, name) {
  const address = URL.createObjectURL(blob);
  Object.assign(document.createElement("a"), { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}
