// Starts a mock shop and a sidecar, generates traffic, and operates the dashboard in a browser.
// node check.mjs FOLDER-FOR-SCREENSHOTS

import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { chromium } from 'playwright-core'

const screenshots = process.argv[2]
const folder = mkdtempSync(join(tmpdir(), 'sidecache-dashboard-'))
const running = []
process.on('exit', () => { running.forEach(child => child.kill('SIGKILL')); rmSync(folder, { recursive: true, force: true }) })
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(1))

const freePort = () => new Promise((resolve, reject) => {
  const probe = createServer().on('error', reject)
  probe.listen(0, '127.0.0.1', () => { const { port } = probe.address(); probe.close(() => resolve(port)) })
})

// Starts the program and waits for a line.
const start = (args, line) => new Promise((resolve, reject) => {
  const child = spawn(process.env.SIDECACHE, args, { stdio: ['ignore', 'pipe', 'ignore'] })
  running.push(child)
  child.on('exit', code => reject(new Error(`the process exited with ${code}: ${args.join(' ')}`)))
  createInterface({ input: child.stdout }).on('line', text => { if (text.includes(line)) resolve(child) })
})

const [shop, port, admin, redis] = [await freePort(), await freePort(), await freePort(), await freePort()]
writeFileSync(join(folder, 'token'), 'open sesame\n')
const config = join(folder, 'sidecache.toml')
writeFileSync(config, `[[upstream]]\nname = "shop"\nurl = "http://127.0.0.1:${shop}"\nlisten = "127.0.0.1:${port}"\n` +
  'profile = "shopify"\n[[upstream.rule]]\npath = "/admin/api/*/products/{id}.json"\nttl = "1m"\ntags = ["product:{id}"]\n' +
  `[redis]\nurl = "redis://127.0.0.1:${redis}"\n[admin]\nlisten = "127.0.0.1:${admin}"\ntoken = { file = "token" }\n`)
await start(['mock-shop', '--listen', `127.0.0.1:${shop}`, '--errors', '0.05'], 'http')
await start(['--config', config], 'listening admin')

const ask = path => fetch(`http://127.0.0.1:${port}/admin/api/2026-07/${path}`, { headers: { 'X-Shopify-Access-Token': 'shpat_shop0_app0' } }).then(answer => answer.text())
// As text: the IDs exceed JavaScript's safe integers.
let ids = []
while (!ids.length) ids = [...new Set([...(await ask('products.json?limit=7')).matchAll(/"product_id":\s*(\d+)/g)].map(found => found[1]))]
let done = false
const traffic = (async () => { for (let n = 0; !done; n++) await ask(`products/${ids[n % ids.length]}.json`) })()

const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ['--no-sandbox'] })
const open = async (options, at = admin) => {
  const page = await browser.newPage(options)
  const wrong = []
  page.on('pageerror', error => wrong.push(error.message))
  page.on('request', request => { if (!request.url().startsWith(`http://127.0.0.1:${at}/`)) wrong.push(`request to another host: ${request.url()}`) })
  await page.goto(`http://127.0.0.1:${at}/`)
  return [page, wrong]
}
const enter = async page => {
  await page.getByLabel('Token').waitFor()
  await page.getByLabel('Token').fill('open sesame')
  await page.getByRole('button', { name: 'Open' }).click()
}

// Before any request: no data, no Redis, no token.
const [emptyPort, emptyAdmin] = [await freePort(), await freePort()]
writeFileSync(join(folder, 'empty.toml'), `[[upstream]]\nurl = "http://127.0.0.1:${shop}"\nlisten = "127.0.0.1:${emptyPort}"\n[admin]\nlisten = "127.0.0.1:${emptyAdmin}"\n`)
await start(['--config', join(folder, 'empty.toml')], 'listening admin')
const [empty, wrongWhenEmpty] = await open({ viewport: { width: 1200, height: 1150 } }, emptyAdmin)
await empty.getByText('well', { exact: true }).waitFor()
for (const table of ['rules', 'recent', 'failures']) await empty.locator(`#${table}`).getByText('nothing yet').waitFor()
await empty.screenshot({ path: join(screenshots, 'empty.png'), fullPage: true })
// The token dialog, operated by keyboard. The page keeps the token.
const [page, wrong] = await open({ viewport: { width: 1200, height: 1150 } })
await page.getByLabel('Token').waitFor()
await page.getByLabel('Token').fill('wrong')
await page.keyboard.press('Enter')
await page.getByText('a token is needed').waitFor()
await enter(page)
// Redis is down: the page reports it.
await page.getByText('degraded: what is stored is still served').waitFor()
await page.locator('#parts').getByText('down').waitFor()
await page.locator('#requests rect').nth(5).waitFor({ state: 'attached' })
const saved = await page.locator('dt', { hasText: 'upstream calls saved' }).locator('..').locator('dd').textContent()
assert.ok(Number(saved.replaceAll(',', '')) > 10, `${saved} calls saved`)
await page.screenshot({ path: join(screenshots, 'light.png'), fullPage: true })

// Rules and recent requests.
await page.locator('#rules').getByText('shop/admin/api/*/products/{id}.json').waitFor()
await page.getByLabel('Only').selectOption('hit')
await page.locator('#recent tr', { hasText: 'hit' }).nth(2).waitFor()
await page.getByLabel('Only').selectOption('')

// Purge.
await page.getByLabel('Value').fill(`product:${ids[0]}`)
await page.getByRole('button', { name: 'Purge' }).click()
await page.getByText('purged: 1 selector(s)').waitFor()

// The kill switch asks for confirmation.
page.once('dialog', dialog => dialog.dismiss())
await page.getByRole('button', { name: 'Pass everything through' }).click()
assert.match(await page.locator('#mode').textContent(), /normal/)
page.once('dialog', dialog => dialog.accept())
await page.getByRole('button', { name: 'Pass everything through' }).click()
await page.getByText('mode bypass, set by hand for another 30 min').waitFor()
await page.getByRole('button', { name: 'Back to what is configured' }).click()
await page.locator('#mode', { hasText: /^mode normal$/ }).waitFor()

// Shadow mode.
page.once('dialog', dialog => dialog.accept())
await page.getByRole('button', { name: 'Shadow mode' }).click()
await page.getByText('mode shadow, set by hand for another 30 min').waitFor()
await page.locator('#shadow td').nth(3).waitFor()
await page.screenshot({ path: join(screenshots, 'shadow.png'), fullPage: true })
await page.getByRole('button', { name: 'Back to what is configured' }).click()

// A phone screen in dark mode: the page fits the width.
const [phone, wrongThere] = await open({ viewport: { width: 390, height: 1400 }, colorScheme: 'dark' })
await enter(phone)
await phone.locator('#requests rect').nth(2).waitFor({ state: 'attached' })
assert.ok(await phone.evaluate(() => document.documentElement.scrollWidth <= innerWidth), 'the page exceeds the width of the screen')
await phone.screenshot({ path: join(screenshots, 'phone.png'), fullPage: true })

// Every control has an accessible name.
const unnamed = await page.evaluate(() => [...document.querySelectorAll('input, select, button')].filter(one => !(one.labels?.length || one.textContent.trim())).map(one => one.id))
assert.deepEqual(unnamed, [])
assert.deepEqual([...wrong, ...wrongThere, ...wrongWhenEmpty], [])

done = true
await traffic
await browser.close()
console.log(`all dashboard checks passed; screenshots in ${screenshots}`)
process.exit(0)
