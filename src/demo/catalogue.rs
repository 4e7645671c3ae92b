//! Generated resources of the mock shop, in the format of the REST Admin API.
//!
//! They are the same at every start. Product ids are above 2^53, so that a client that parses numbers as floats fails.

use serde_json::{Value, json};

/// The id of the first product: 2^53 + 1, which a double can't represent.
pub const FIRST_ID: u64 = 9_007_199_254_740_993;

const NOUNS: [&str; 12] =
    ["Lamp", "Kettle", "Notebook", "Rucksack", "Chair", "Scarf", "Teapot", "Mug", "Blanket", "Clock", "Vase", "Tray"];
const ADJECTIVES: [&str; 10] =
    ["Quiet", "Copper", "Woollen", "Northern", "Plain", "Blue", "Folding", "Heavy", "Second", "Bright"];
const VENDORS: [&str; 5] = ["Hafen & Co", "Brandt", "Östlund", "Keramik Süd", "Papierwerk"];
const SIZES: [&str; 3] = ["Small", "Medium", "Large"];
const WHEN: &str = "2026-03-01T09:00:00+01:00";

/// Returns all products of a shop.
pub fn products(shop: usize, count: usize) -> Vec<Value> {
    (0..count).map(|index| product(shop, index)).collect()
}

/// Returns the id of the `index`-th product of a shop.
pub fn product_id(shop: usize, index: usize) -> u64 {
    FIRST_ID + (shop as u64) * 1_000_000_000 + index as u64
}

fn product(shop: usize, index: usize) -> Value {
    let id = product_id(shop, index);
    let pick = |list: &[&'static str], salt: usize| list[(index * 7 + shop * 3 + salt) % list.len()];
    let title = format!("{} {} No. {}", pick(&ADJECTIVES, index / 12), pick(&NOUNS, 1), index + 1);
    let handle = title.to_lowercase().replace([' ', '.'], "-").replace("--", "-");
    let count = 1 + index % SIZES.len();
    let variants: Vec<Value> = (0..count).map(|position| variant(id, index, position)).collect();
    json!({
        "id": id,
        "admin_graphql_api_id": format!("gid://shopify/Product/{id}"),
        "title": title,
        "handle": handle,
        "body_html": format!("<p>{title}: made to be used every day, and to be repaired when it breaks.</p>"),
        "vendor": pick(&VENDORS, 2),
        "product_type": pick(&NOUNS, 1),
        "tags": format!("{}, {}", pick(&ADJECTIVES, 3), pick(&VENDORS, 4)),
        "status": "active",
        "published_scope": "web",
        "template_suffix": null,
        "created_at": WHEN,
        "updated_at": WHEN,
        "published_at": WHEN,
        "options": [{
            "id": id + 500_000_000_000, "product_id": id, "name": "Size", "position": 1, "values": SIZES[..count],
        }],
        "images": [{
            "id": id + 700_000_000_000, "product_id": id, "position": 1, "width": 1200, "height": 900,
            "created_at": WHEN, "updated_at": WHEN, "variant_ids": [],
            "src": format!("https://cdn.shop.example/files/{handle}.png?v=1"),
        }],
        "variants": variants,
    })
}

fn variant(product: u64, index: usize, position: usize) -> Value {
    let id = product * 4 - FIRST_ID * 3 + position as u64;
    json!({
        "id": id,
        "admin_graphql_api_id": format!("gid://shopify/ProductVariant/{id}"),
        "product_id": product,
        "title": SIZES[position],
        "option1": SIZES[position], "option2": null, "option3": null,
        "price": format!("{}.{:02}", 5 + index % 95, (index * 7) % 100),
        "compare_at_price": null,
        "sku": format!("SKU-{index:05}-{position}"),
        "position": position + 1,
        "grams": 100 + index % 900,
        "taxable": true,
        "requires_shipping": true,
        "inventory_item_id": id + 1_000_000_000_000,
        "inventory_management": "shopify",
        "inventory_policy": "deny",
        "inventory_quantity": (index * 13 + position) % 50,
        "created_at": WHEN, "updated_at": WHEN,
    })
}

/// Returns the shop resource.
pub fn shop(index: usize) -> Value {
    json!({"shop": {
        "id": 690_933_842 + index, "name": format!("Mock Shop {index}"), "email": "owner@shop.example",
        "domain": format!("shop{index}.example"), "myshopify_domain": format!("shop{index}.myshopify.com"),
        "country": "DE", "currency": "EUR", "timezone": "(GMT+01:00) Europe/Berlin", "plan_name": "basic",
        "shop_owner": "Mock Owner", "created_at": WHEN, "updated_at": WHEN,
    }})
}

/// Returns a small list of other resources by its name, or `None` if there is no such list.
pub fn others(shop: usize, name: &str) -> Option<Vec<Value>> {
    let titles: &[&str] = match name {
        "locations" => &["Harbour Warehouse", "Station Store"],
        "custom_collections" => &["Home page", "Kitchen", "Desk"],
        "smart_collections" => &["New", "Under 20"],
        "pages" => &["About us", "Shipping", "Repairs"],
        "blogs" => &["Workshop notes"],
        "orders" => &["#1001", "#1002"],
        "inventory_levels" => &["a", "b"],
        _ => return None,
    };
    let item = |(i, title): (usize, &&str)| {
        let id = 400_000_000 + shop * 1000 + i;
        let handle = title.to_lowercase().replace(' ', "-");
        json!({
            "id": id, "title": title, "name": title, "handle": handle, "available": i * 7, "location_id": id,
            "created_at": WHEN, "updated_at": WHEN,
        })
    };
    Some(titles.iter().enumerate().map(item).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn product_catalogue_is_deterministic_with_ids_above_2_to_the_53() {
        assert_eq!(products(0, 50), products(0, 50));
        assert_ne!(products(0, 1), products(1, 1));
        for product in products(1, 50) {
            assert!(product["id"].as_u64().expect("an id") > 1 << 53);
        }
    }
}
