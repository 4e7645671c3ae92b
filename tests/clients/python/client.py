"""Tests the official Shopify client through the sidecar: pagination, call limits, a write, and hits."""

import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request

import shopify

TOKEN = "shpat_shop0_app0"
VERSION = "2026-07"
checks = 0


class Program:
    """A sidecache process, terminated at the end of the block."""

    def __init__(self, *arguments):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SIDECACHE_")}
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(timeout=30)

    def address(self, of):
        """Returns the address in the first line that contains this text."""
        for line in self.process.stdout:
            if of in line:
                return re.search(r"addr=(\S+)", line).group(1)
        raise SystemExit(f"no line with {of!r}")


def calls(shop):
    with urllib.request.urlopen(f"http://{shop}/__stats") as answer:
        return json.load(answer)["requests"]


def check(what, found, expected):
    if found != expected:
        raise SystemExit(f"FAILED {what}: {found!r}, expected {expected!r}")
    global checks
    checks += 1
    print(f"ok   {what}")


def three_pages():
    """Returns all pages as lists, because the client's collections also count the following pages."""
    page = shopify.Product.find(limit=4)
    pages = [[product for product in page]]
    while page.has_next_page():
        page = page.next_page()
        pages.append([product for product in page])
    return pages


def run(binary):
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        with Program(binary, "mock-shop", "--listen", "127.0.0.1:0", "--products", "12", "--leak", "0.001") as shop_program:
            shop = shop_program.address("mock-shop")
            config.write(
                f'[[upstream]]\nprofile = "shopify"\nurl = "http://{shop}"\nlisten = "127.0.0.1:0"\n'
                f'[admin]\nlisten = "127.0.0.1:0"\n'
            )
            config.flush()
            with Program(binary, "--config", config.name) as program:
                scenario(program.address("upstream=shopify"), shop)


def scenario(sidecar, shop):
    shopify.ShopifyResource.set_site(f"http://{sidecar}/admin/api/{VERSION}")
    shopify.ShopifyResource.set_headers({"X-Shopify-Access-Token": TOKEN})

    pages = three_pages()
    check("three pages are read by their Link fields", [len(page) for page in pages], [4, 4, 4])
    first = pages[0][0]
    check("ids beyond 2^53 are exact", first.id, 9007199254740993)
    check("each page is one upstream request", calls(shop), 3)
    check("the second time all pages are hits", ([len(page) for page in three_pages()], calls(shop)), ([4, 4, 4], 3))

    check("shopify.Limits reads the call limit", (shopify.Limits.credit_used(), shopify.Limits.credit_limit()), (3, 40))

    product = shopify.Product.find(first.id)
    product.title = "A new title"
    check("a product is updated", product.save(), True)
    check("its new title is read back", shopify.Product.find(first.id).title, "A new title")
    check("its new title is in the list, too", shopify.Product.find(limit=4)[0].title, "A new title")
    before = calls(shop)
    check("a read after that is a hit", (shopify.Product.find(first.id).title, calls(shop)), ("A new title", before))
    check("count", shopify.Product.count(), 12)
    print(f"\n{checks} passed, 0 failed")


if __name__ == "__main__":
    run(sys.argv[1])
