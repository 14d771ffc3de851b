// The routes of the server that the page came from, by addresses relative to the page: it may be at any sub path.
import { hasText, number, text } from "./words.js";

const HOME = new URL(".", document.baseURI);

/** What the server, or the way to it, refused. code: as of the API; sentence: for the reader, in her language. */
export class Refusal extends Error {
  constructor(status, { code = null, message = "", param = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param });
  }

  /** Whether the same request may be answered a little later. */
  get mayPass() {
    return this.status === 0 || this.status >= 500;
  }

  get sentence() {
    const field = (this.param ?? "").split(/[.[]/)[0];
    const named = this.code && hasText(`error.${this.code}`) ? this.code : field;
    const message = this.param ? this.message.replace(`${this.param}: `, "") : this.message;
    const limit = /\d+/.exec(message);
    return text(named && hasText(`error.${named}`) ? `error.${named}` : "error.other", {
      message: message.slice(0, 300),
      limit: limit ? number(Number(limit[0])) : "…",
    });
  }
}

/** An address below the page. */
export function address(path, parameters = {}) {
  const url = new URL(path, HOME);
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== undefined && value !== null && value !== "") url.searchParams.set(name, value);
  }
  return url;
}

/** An address that an answer names, which begins where the server thinks it is. */
export function named(path, parameters = {}) {
  return path === null || path === undefined
    ? null
    : address(path.slice(path.indexOf("/v1/index/") + 1), parameters).href;
}

async function answer(path, { parameters, body, headers = {}, signal } = {}) {
  let response;
  try {
    response = await fetch(address(path, parameters), {
      method: body === undefined ? "GET" : "POST",
      headers: body === undefined ? headers : { "Content-Type": "application/json", ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, { code: "network" });
  }
  if (response.ok) return response.status === 204 ? null : response.json();
  const found = await response.json().catch(() => ({}));
  throw new Refusal(response.status, found.error ?? {});
}

let askForKey = async () => {};
let asking = null;

/** Sets what asks the reader for the key; it returns when the server has taken it. */
export const onKeyWanted = (function_) => (askForKey = function_);

/** What the route answers as JSON; asks for the key when one is wanted. Throws Refusal. */
export async function ask(path, options) {
  try {
    return await answer(path, options);
  } catch (error) {
    if (error.status !== 401) throw error;
    asking ??= askForKey().finally(() => (asking = null));
    await asking;
    return ask(path, options);
  }
}

/** Opens a session with the key. Throws Refusal for a wrong one. */
export const enter = (key) =>
  answer("v1/session", { body: {}, headers: { Authorization: `Bearer ${key}` } });
