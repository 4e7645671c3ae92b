// Starts the sidecar, then the suite's origin, sends all its tests through, counts, and compares with the floor.
// node suite.mjs FLOOR.json [VARIANT...]. Must be run from the folder that contains node_modules.

import { spawn } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createServer, connect } from 'node:net'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import fetch from 'node-fetch'

const here = dirname(fileURLToPath(import.meta.url))
const suite = join(here, 'node_modules', 'http-cache-tests')
const [floorFile, ...requested] = process.argv.slice(2)
const floor = JSON.parse(readFileSync(floorFile))
const only = process.env.CONFORMANCE_TEST

const variants = {
  default: {},
  // Two required tests want Set-Cookie in responses from the cache.
  'set-cookie': { rule: '[[upstream.rule]]\npath = "/**"\ncache = "http"\nset_cookie = "store"\n' },
  everyone: { partition: 'partition = "everyone"\n' },
  redis: { redis: true },
  'redis-only': { redis: true, memory: '[memory]\nmax_bytes = "0B"\n' }
}

const freePort = () => new Promise((resolve, reject) => {
  const probe = createServer().on('error', reject)
  probe.listen(0, '127.0.0.1', () => {
    const { port } = probe.address()
    probe.close(() => resolve(port))
  })
})

const listens = async (port, what) => {
  for (let tries = 0; tries < 200; tries++) {
    const open = await new Promise(resolve => {
      const socket = connect(port, '127.0.0.1', () => { socket.destroy(); resolve(true) })
      socket.on('error', () => resolve(false))
    })
    if (open) return
    await new Promise(resolve => setTimeout(resolve, 50))
  }
  throw new Error(`${what} does not listen on port ${port}`)
}

const running = []
const start = (program, args, options) => {
  const child = spawn(program, args, { stdio: ['ignore', 'ignore', 'inherit'], ...options })
  running.push(child)
  return child
}
const stopAll = () => running.splice(0).forEach(child => child.kill('SIGKILL'))
process.on('exit', stopAll)
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(1))

// The suite keeps results in its modules: each variant runs in a separate process.
const runVariant = async name => {
  const { partition = '', rule = '', memory = '', redis } = variants[name]
  const [port, originPort, redisPort] = [await freePort(), await freePort(), await freePort()]
  const folder = mkdtempSync(join(tmpdir(), 'sidecache-conformance-'))
  try {
    let shared = ''
    if (redis) {
      start('redis-server', ['--port', redisPort, '--bind', '127.0.0.1', '--save', '', '--dir', folder])
      await listens(redisPort, 'redis-server')
      shared = `[redis]\nurl = "redis://127.0.0.1:${redisPort}"\n`
    }
    const config = join(folder, 'config.toml')
    writeFileSync(config, `[[upstream]]\nname = "suite"\nurl = "http://127.0.0.1:${originPort}"\n` +
      `listen = "127.0.0.1:${port}"\n${partition}${rule}[admin]\nlisten = "off"\n` +
      `[log]\nfilter = "error"\n${memory}${shared}`)
    start(process.env.SIDECACHE, ['--config', config])
    await listens(port, 'the sidecar')
    start('node', [join(suite, 'server', 'server.mjs')], {
      cwd: suite,
      env: {
        ...process.env,
        npm_config_protocol: 'http',
        npm_config_port: originPort,
        npm_config_pidfile: join(folder, 'pid')
      }
    })
    await listens(originPort, "the suite's origin")
    await report(name, port)
  } finally {
    stopAll()
    rmSync(folder, { recursive: true, force: true })
  }
}

const report = async (name, port) => {
  const { runTests, getResults } = await import(join(suite, 'client', 'runner.mjs'))
  const { default: suites } = await import(join(suite, 'tests', 'index.mjs'))
  const all = new Map(suites.flatMap(({ tests }) => tests).map(test => [test.id, test]))
  if (only) all.get(only).dump = true
  const wanted = only ? [{ name: only, id: only, tests: [all.get(only)] }] : suites
  await runTests(wanted, fetch, false, `http://127.0.0.1:${port}`)
  const results = getResults()
  const passed = id => results[id] === true && (all.get(id).depends_on ?? []).every(passed)
  const counted = { required: [0, 0], optimal: [0, 0] }
  for (const id of Object.keys(results)) {
    const kind = all.get(id).kind ?? 'required'
    if (kind === 'check') continue
    counted[kind][1]++
    if (passed(id)) counted[kind][0]++
    else console.log(`  ${kind === 'required' ? 'FAILS' : 'fails'} ${id}: ${[].concat(results[id]).join(': ')}`)
  }
  const summary = Object.entries(counted).map(([kind, [n, of]]) => `${kind} ${n} of ${of}`)
  console.log(`${name}: ${summary.join(', ')}`)
  if (only) return
  for (const kind of Object.keys(counted)) {
    if (counted[kind][0] < floor[name][kind]) {
      console.log(`${name}: fewer ${kind} tests pass than the floor in ${floorFile}, ${floor[name][kind]}`)
      process.exitCode = 1
    }
  }
}

const names = requested.length ? requested : Object.keys(variants)
if (names.length === 1) {
  await runVariant(names[0])
} else {
  for (const name of names) {
    const child = spawn(process.execPath, [...process.execArgv, process.argv[1], floorFile, name], { stdio: 'inherit' })
    const code = await new Promise(resolve => child.on('exit', resolve))
    if (code !== 0) process.exitCode = 1
  }
}
