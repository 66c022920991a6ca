// JSON schemas of Zod's types, by name, as one line of JSON.
import { z } from "zod";

const types = {
  record: z.record(z.string(), z.number()),
  "record of an enum": z.record(z.enum(["a", "b"]), z.number()),
  "partial record": z.partialRecord(z.enum(["a", "b"]), z.number()),
  "record of a pattern": z.record(z.string().regex(/^k\d$/), z.boolean()),
  set: z.array(z.string()).min(1).max(3),
  tuple: z.tuple([z.string(), z.number()]),
  union: z.union([z.string(), z.number(), z.null()]),
  discriminated: z.discriminatedUnion("k", [z.object({ k: z.literal("a") }), z.object({ k: z.literal("b"), n: z.int() })]),
  loose: z.looseObject({ a: z.string() }),
  intersection: z.intersection(z.object({ a: z.string() }), z.object({ b: z.number() })),
  nullable: z.nullable(z.string()),
  startsWith: z.string().startsWith("abc").endsWith("z").includes("m"),
  upper: z.string().uppercase().trim().min(2).max(9),
  multiple: z.number().multipleOf(5).positive(),
  ...Object.fromEntries(
    ["email", "url", "uuid", "uuidv4", "guid", "cuid", "cuid2", "ulid", "nanoid", "jwt", "emoji", "e164", "base64",
      "base64url", "ipv4", "ipv6", "cidrv4", "cidrv6", "xid", "ksuid", "hostname", "hex"]
      .map((name) => [name, z[name]()])),
  ...Object.fromEntries(["date", "time", "datetime", "duration"].map((name) => [`iso ${name}`, z.iso[name]()])),
};
const schemas = Object.entries(types).map(([name, type]) => [name, z.toJSONSchema(z.object({ x: type }))]);
console.log(JSON.stringify(Object.fromEntries(schemas)));
