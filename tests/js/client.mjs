// The official JavaScript client against a server, by its proxyUrl and by requestMiddleware.
//
//     node client.mjs http://127.0.0.1:PORT     with @fal-ai/client in node_modules on the way up
//
// Ends with 0 and "ok" a line for each check, or with 1 and what was wrong.

import assert from "node:assert/strict";
import { createFalClient } from "@fal-ai/client";

const base = process.argv[2];
const KREA = "fal-ai/flux/krea";
const small = { image_size: { width: 128, height: 128 }, num_inference_steps: 2 };
const long = { image_size: { width: 512, height: 512 }, num_inference_steps: 50, num_images: 4 };
const fox = { prompt: "a red fox in fresh snow", seed: 7, ...small };

const places = { "fal.run": "run", "queue.fal.run": "queue", "rest.fal.ai": "rest" };
const rewrite = (url) => {
  const { hostname, pathname, search } = new URL(url);
  return `${base}/${places[hostname]}${pathname}${search}`;
};
const configurations = {
  proxyUrl: { proxyUrl: { url: `${base}/proxy`, when: "always" } },
  requestMiddleware: {
    credentials: "local",
    requestMiddleware: async (request) => ({ ...request, url: rewrite(request.url) }),
  },
};

async function bytes(url) {
  const answer = await fetch(url);
  assert.equal(answer.status, 200);
  return Buffer.from(await answer.arrayBuffer());
}

async function check(fal) {
  const { data, requestId } = await fal.run(KREA, { input: fox });
  assert.match(requestId, /^[0-9a-f-]{32,}$/);
  assert.equal(data.seed, 7);
  assert.deepEqual(data.has_nsfw_concepts, [false]);
  assert.equal(data.images[0].width, 128);
  const picture = await bytes(data.images[0].url);
  assert.deepEqual([...picture.subarray(0, 2)], [0xff, 0xd8]);

  for (const mode of ["polling", "streaming"]) {
    const updates = [];
    const result = await fal.subscribe(KREA, {
      input: fox, logs: true, mode, onQueueUpdate: (update) => updates.push(update),
    });
    assert.equal(result.data.seed, 7);
    assert.deepEqual(await bytes(result.data.images[0].url), picture);
    const last = updates.at(-1);
    assert.equal(last.status, "COMPLETED");
    const lines = last.logs.map((line) => line.message);
    assert.ok(lines.length > 0);
    assert.equal(new Set(lines).size, lines.length, `told twice: ${lines}`);
  }

  const { request_id: id } = await fal.queue.submit(KREA, { input: { prompt: "long", ...long } });
  assert.match((await fal.queue.status(KREA, { requestId: id })).status, /IN_(QUEUE|PROGRESS)/);
  await assert.rejects(fal.queue.result(KREA, { requestId: id }), { status: 400 });
  await fal.queue.cancel(KREA, { requestId: id });
  let status;
  do status = await fal.queue.status(KREA, { requestId: id, logs: true });
  while (status.status !== "COMPLETED");
  await assert.rejects(fal.queue.result(KREA, { requestId: id }), { status: 499 });

  const stream = await fal.stream(KREA, { input: { ...fox, num_inference_steps: 8 } });
  let events = 0;
  for await (const event of stream) {
    assert.equal(event.images.length, 1);
    events += 1;
  }
  assert.ok(events >= 2);
  const done = await stream.done();
  assert.deepEqual((await bytes(done.images[0].url)).subarray(0, 2), picture.subarray(0, 2));

  const blob = new Blob([picture], { type: "image/jpeg" });
  assert.deepEqual(await bytes(await fal.storage.upload(blob)), picture);
  const redrawn = await fal.run(`${KREA}/image-to-image`, {
    input: { prompt: "x", image_url: blob, num_inference_steps: 10, strength: 0.2 },
  });
  assert.equal(redrawn.data.images[0].height, 128);

  await assert.rejects(fal.run(KREA, { input: { prompt: "x", num_images: 9 } }), (error) => {
    assert.equal(error.name, "ValidationError");
    assert.deepEqual(error.fieldErrors[0].loc, ["body", "num_images"]);
    return true;
  });
  await assert.rejects(fal.run("fal-ai/flux/dev", { input: fox }), (error) => {
    assert.equal(error.status, 404);
    assert.match(error.body.detail, /krea-local serve --model dev/);
    return true;
  });
}

for (const [name, configuration] of Object.entries(configurations)) {
  await check(createFalClient(configuration));
  console.log(`ok ${name}`);
}
