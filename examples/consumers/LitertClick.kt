// Segment what one click on a photo means, on Android, with the files of a LiteRT artifact in the app's assets.
// NOT RUN: only read, against the API of com.google.ai.edge.litert:litert:2.3.0. litert_click.py does the same and is run in the tests.
//     val (mask, iou) = Clicker(context.assets).click(photo, x = 250f, y = 180f)

import android.content.res.AssetManager
import android.graphics.Bitmap
import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel
import org.json.JSONObject
import kotlin.math.max

class Clicker(assets: AssetManager, accelerator: Accelerator = Accelerator.CPU) : AutoCloseable {
    private val manifest = JSONObject(assets.open("manifest.json").bufferedReader().readText())
    private val spec = manifest.getJSONObject("preprocess").also { require(it.getString("pad") == "right_bottom_zero") }
    private val size = spec.getInt("image_size")
    private val side = if (spec.isNull("prompt_size")) size else spec.getInt("prompt_size") // of the square that points and masks are in
    private val points = part("decoder").getJSONObject("fixed").getInt("points") // the file takes this number; -2 marks those that are not there
    private val encoder = CompiledModel.create(assets, part("encoder").getString("file"), CompiledModel.Options(accelerator))
    private val decoder = CompiledModel.create(assets, part("decoder").getString("file"), CompiledModel.Options(Accelerator.CPU))

    private fun part(name: String) = manifest.getJSONObject("components").getJSONObject(name)

    /** x and y in pixels of the photo -> for every pixel of it whether it is meant, row by row; and how good the model thinks that is. */
    fun click(photo: Bitmap, x: Float, y: Float): Pair<BooleanArray, Float> {
        val embedding = run(encoder, mapOf("images" to images(photo)), "image_embeddings").getValue("image_embeddings")
        val scale = side.toFloat() / max(photo.width, photo.height)
        val coords = FloatArray(points * 2).also { it[0] = x * scale - 0.5f; it[1] = y * scale - 0.5f } // SAM counts pixel centres from 0
        val labels = FloatArray(points) { if (it == 0) 1f else -2f }
        val found = run(decoder, mapOf("image_embeddings" to embedding, "point_coords" to coords, "point_labels" to labels,
            "mask_input" to FloatArray(side / 4 * (side / 4)), "has_mask" to FloatArray(1)), "masks", "iou")
        val n = side / 4 // masks (1, 4, n, n): 1 to 3 are other readings of a click. Nearest cell here; interpolate for smooth edges
        val mask = BooleanArray(photo.width * photo.height) { i ->
            val column = (i % photo.width * scale / 4).toInt().coerceAtMost(n - 1)
            val row = (i / photo.width * scale / 4).toInt().coerceAtMost(n - 1)
            found.getValue("masks")[row * n + column] > 0
        }
        return mask to found.getValue("iou")[0]
    }

    /** Photo -> (1, 3, size, size), normalised, at the top left of a square of zeros. */
    private fun images(photo: Bitmap): FloatArray {
        val scale = size.toFloat() / max(photo.width, photo.height)
        val (w, h) = Pair(max(1, (photo.width * scale + 0.5f).toInt()), max(1, (photo.height * scale + 0.5f).toInt()))
        val pixels = IntArray(w * h).also { Bitmap.createScaledBitmap(photo, w, h, true).getPixels(it, 0, w, 0, 0, w, h) }
        val (mean, std) = listOf("mean", "std").map { key -> FloatArray(3) { c -> spec.getJSONArray(key).getDouble(c).toFloat() } }
        return FloatArray(3 * size * size).also { planes ->
            for (c in 0..2) for (i in pixels.indices)
                planes[(c * size + i / w) * size + i % w] = ((pixels[i] shr (16 - 8 * c) and 255) - mean[c]) / std[c]
        }
    }

    private fun run(model: CompiledModel, inputs: Map<String, FloatArray>, vararg wanted: String): Map<String, FloatArray> {
        val given = inputs.mapValues { (name, data) -> model.createInputBuffer(name).also { it.writeFloat(data) } }
        val found = wanted.associateWith { model.createOutputBuffer(it) }
        model.run(given, found)
        return found.mapValues { it.value.readFloat() }.also { (given.values + found.values).forEach { buffer -> buffer.close() } }
    }

    override fun close() { encoder.close(); decoder.close() }
}
