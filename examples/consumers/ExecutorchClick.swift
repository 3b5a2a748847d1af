// Segment what one click on a photo means, with an ExecuTorch artifact of edgekd (formats executorch and executorch_coreml).
// NOT RUN here: read against the Swift API of ExecuTorch 1.x. Package pytorch/executorch, branch swiftpm-1.x: executorch, kernels_optimized, and
// backend_xnnpack or backend_coreml.
//
//     ./ExecutorchClick ARTIFACT PHOTO X,Y      prints {"iou": ..., "share": ...} of the mask over the square that the photo was fitted to
import CoreGraphics
import ExecuTorch
import Foundation
import ImageIO

struct Preprocess: Decodable { let image_size: Int, mean: [Float], std: [Float], prompt_size: Int?, pad: String }
struct Input: Decodable { let name: String }
struct Part: Decodable { let file: String, inputs: [Input], fixed: [String: Int] }
struct Manifest: Decodable { let preprocess: Preprocess, components: [String: Part] }

func filled(_ shape: [Int], _ value: (Int) -> Float) -> Tensor<Float> {
    Tensor<Float>((0..<shape.reduce(1, *)).map(value), shape: shape)
}

func run(_ module: Module, _ inputs: [Tensor<Float>]) throws -> [[Float]] {  // outputs lie in the module's memory: copied while it is there
    try withExtendedLifetime(module) { let found: [Tensor<Float>] = try module.forward(inputs); return found.map { $0.scalars() } }
}

@main struct Click {
    static func main() throws {
        let arguments = CommandLine.arguments
        let artifact = URL(fileURLWithPath: arguments[1]), click = arguments[3].split(separator: ",").map { Float($0)! }
        let manifest = try JSONDecoder().decode(Manifest.self, from: Data(contentsOf: artifact.appendingPathComponent("manifest.json")))
        let spec = manifest.preprocess, part = manifest.components["decoder"]!, points = part.fixed["points"]!
        let size = spec.image_size, side = spec.prompt_size ?? size  // of the squares that photos, and points and masks, are in
        let opened = { (name: String) in Module(filePath: artifact.appendingPathComponent(manifest.components[name]!.file).path) }
        let source = CGImageSourceCreateWithURL(URL(fileURLWithPath: arguments[2]) as CFURL, nil)!
        let photo = CGImageSourceCreateImageAtIndex(source, 0, nil)!  // turn it by its EXIF orientation where it has one

        let longest = Float(max(photo.width, photo.height)), stretched = spec.pad == "stretch"
        func inside(_ n: Int, _ square: Int) -> Int { stretched ? square : max(1, Int(Float(n) * Float(square) / longest + 0.5)) }
        let width = inside(photo.width, size), height = inside(photo.height, size)
        var pixels = [UInt8](repeating: 0, count: width * height * 4)
        let context = CGContext(data: &pixels, width: width, height: height, bitsPerComponent: 8, bytesPerRow: width * 4,
                                space: CGColorSpace(name: CGColorSpace.sRGB)!, bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)!
        context.interpolationQuality = .medium
        context.draw(photo, in: CGRect(x: 0, y: 0, width: width, height: height))
        let images = filled([1, 3, size, size]) { i in  // planes of RGB, normalised, zeros right and below
            let channel = i / (size * size), y = i / size % size, x = i % size
            return x < width && y < height ? (Float(pixels[(y * width + x) * 4 + channel]) - spec.mean[channel]) / spec.std[channel] : 0
        }
        let seen = try run(opened("encoder"), [images])[0], cells = side / 16
        let point = [click[0] * Float(inside(photo.width, side)) / Float(photo.width) - 0.5, click[1] * Float(inside(photo.height, side)) / Float(photo.height) - 0.5]
        let prompt: [String: Tensor<Float>] = [  // one prompt: a point of label 1, in the object, and label -2, no point, for the others
            "image_embeddings": Tensor<Float>(seen, shape: [1, seen.count / (cells * cells), cells, cells]),
            "point_coords": filled([1, points, 2]) { $0 < 2 ? point[$0] : 0 }, "point_labels": filled([1, points]) { $0 == 0 ? 1 : -2 },
            "mask_input": filled([1, 1, side / 4, side / 4]) { _ in 0 }, "has_mask": filled([1]) { _ in 0 }]
        let found = try run(opened("decoder"), part.inputs.map { prompt[$0.name]! })  // masks and iou: a .pte knows them by their order alone
        let masks = found[0], iou = found[1], quarter = side / 4
        let object = masks[..<(quarter * quarter)].filter { $0 > 0 }  // the first of four is the answer to a click, the others are other readings of it
        print("{\"iou\": \(iou[0]), \"share\": \(Float(object.count) / Float(quarter * quarter))}")
    }
}
