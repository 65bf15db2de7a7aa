// An OpenID Connect issuer (oidc-provider), and what its administrator does to it.
//
// Prints {"issuer": URL} when it serves. Each line on standard input is a command as JSON, and is answered by a line:
// {"rotate": kid} signs with another key; {"ttl": seconds} is the lifetime of ID tokens; {"sign": {...}, "header": {...},
// "how": ...} signs claims as the issuer would, or as somebody who can't.
import { createHmac, createPublicKey, createPrivateKey, generateKeyPairSync, sign } from 'node:crypto';
import { createServer } from 'node:http';
import { createInterface } from 'node:readline';

import Provider from 'oidc-provider';

const port = Number(process.argv[2] ?? 0);
let ttl = 600;

function made(kid) {
  const { privateKey } = generateKeyPairSync('rsa', { modulusLength: 2048 });
  return { ...privateKey.export({ format: 'jwk' }), kid, use: 'sig', alg: 'RS256' };
}

let key = made('first');
const state = new Map();

class Memory {
  constructor(name) { this.name = name; }
  at(id) { return `${this.name}:${id}`; }
  async upsert(id, payload) { state.set(this.at(id), payload); }
  async find(id) { return state.get(this.at(id)); }
  async where(name, value) {
    for (const [id, each] of state) if (id.startsWith(`${this.name}:`) && each[name] === value) return each;
    return undefined;
  }
  async findByUserCode(code) { return this.where('userCode', code); }
  async findByUid(uid) { return this.where('uid', uid); }
  async destroy(id) { state.delete(this.at(id)); }
  async consume(id) { state.get(this.at(id)).consumed = Math.floor(Date.now() / 1000); }
  async revokeByGrantId(grant) {
    for (const [id, each] of state) if (each.grantId === grant) state.delete(id);
  }
}

function provider(issuer) {
  const made = new Provider(issuer, {
    adapter: Memory,
    jwks: { keys: [key] },
    clients: ['volar', 'another'].map((client_id) => ({
      client_id,
      token_endpoint_auth_method: 'none',
      // On loopback, such a client has an address at any port (RFC 8252, 7.3).
      application_type: 'native',
      grant_types: ['authorization_code', 'urn:ietf:params:oauth:grant-type:device_code', 'refresh_token'],
      response_types: ['code'],
      redirect_uris: ['http://localhost/api/v1/session/oidc/callback'],
    })),
    claims: { openid: ['sub'], profile: ['groups'] },
    conformIdTokenClaims: false,
    features: { deviceFlow: { enabled: true }, devInteractions: { enabled: true } },
    findAccount: (context, id) => ({ accountId: id, claims: () => ({ sub: id, groups: [id] }) }),
    cookies: { keys: ['only a test'] },
    ttl: { IdToken: () => ttl, DeviceCode: () => 120, RefreshToken: () => 3600, Grant: () => 3600, Session: () => 3600,
      Interaction: () => 600, AccessToken: () => 600 },
  });
  return made.callback();
}

function encoded(value) { return Buffer.from(JSON.stringify(value)).toString('base64url'); }

function signed({ sign: claims, header = {}, how = 'key' }) {
  const alg = { key: 'RS256', none: 'none', hmac: 'HS256' }[how];
  const text = `${encoded({ alg, typ: 'JWT', kid: key.kid, ...header })}.${encoded(claims)}`;
  if (how === 'none') return `${text}.`;
  const secret = createPrivateKey({ key, format: 'jwk' });
  if (how === 'key') return `${text}.${sign('sha256', Buffer.from(text), secret).toString('base64url')}`;
  const published = createPublicKey(secret).export({ type: 'spki', format: 'pem' });
  return `${text}.${createHmac('sha256', published).update(text).digest('base64url')}`;
}

let serve;
const server = createServer((request, response) => serve(request, response));
server.listen(port, '127.0.0.1', () => {
  const issuer = `http://127.0.0.1:${server.address().port}`;
  serve = provider(issuer);
  console.log(JSON.stringify({ issuer }));
  createInterface({ input: process.stdin }).on('line', (line) => {
    const command = JSON.parse(line);
    if (command.rotate) { key = made(command.rotate); serve = provider(issuer); }
    if (command.ttl) ttl = command.ttl;
    console.log(JSON.stringify(command.sign ? { token: signed(command) } : { done: true }));
  }).on('close', () => process.exit(0));
});
